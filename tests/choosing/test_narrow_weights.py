"""Weights with fewer inputs than the budget asks for: they give all that they have, and that is said once."""

import pytest
import torch
from torch import nn

import fps_kernels as fps


def model() -> nn.Sequential:
    """A depthwise convolution of 1x1 between two others: its neurons have one input each."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5)
    )


DATA = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("scorer", [fps.FPS(), fps.Random(0), fps.Magnitude()], ids=repr)
def test_rows_give_all_that_they_have(scorer):
    with pytest.warns(UserWarning, match=r"1 weight \(1.weight\) has fewer columns than k=2") as said:
        selection = fps.select(model(), [DATA], scorer=scorer, budget=fps.PerNeuron(2), dense=[], progress=False)
    assert len([w for w in said if "fewer columns" in str(w.message)]) == 1
    assert {name: w.nnz for name, w in selection.items()} == {"0.weight": 16, "1.weight": 8, "2.weight": 8, "4.weight": 10}
    net = model()
    tuner = fps.attach(net, selection)
    net(DATA).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.abs().max() > 0) for value in tuner.parameters())


def test_of_gradients_too():
    batch = DATA, torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="fewer columns than k=2"):
        selection = fps.gps_select(model(), [batch], loss="cross_entropy", budget=fps.PerNeuron(2), dense=[], progress=False)
    assert selection["1.weight"].nnz == 8


def test_a_lora_that_is_larger_than_its_weight():
    with pytest.warns(UserWarning, match="fewer entries than LoRA of rank 4 has numbers there: all are chosen"):
        selection = fps.select(model(), [DATA], budget=fps.LikeLoRA(4), dense=[], progress=False)
    assert selection["1.weight"].density == 1
    assert selection["4.weight"].nnz == 4 * (5 + 144)


def test_nothing_is_said_of_weights_that_have_enough(recwarn):
    fps.select(model(), [DATA], budget=fps.PerNeuron(1), dense=[], progress=False)
    assert not [w for w in recwarn if "fewer" in str(w.message)]


@pytest.mark.parametrize("choose", ["select", "gps_select"])
def test_more_than_any_weight_has_is_refused(choose):
    batch = DATA, torch.tensor([0, 1])
    options = {"loss": "cross_entropy"} if choose == "gps_select" else {}
    with pytest.raises(ValueError, match="k=145 exceeds the 144 columns of the widest weight: choose a smaller k"):
        getattr(fps, choose)(model(), [batch], budget=fps.PerNeuron(145), dense=[], progress=False, **options)
