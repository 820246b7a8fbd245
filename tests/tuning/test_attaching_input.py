"""What ``attach`` and those who use a tuner refuse, by name and with the model unchanged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fps_kernels as fps
from fps_kernels.selection import Selection, WeightSelection
from tests.support.models import Classifier, images, labelled
from tests.support.training import copy_of, loss_of, selected


def refused(model: nn.Module, selection, error: type[Exception], match: str) -> None:
    """Refused, with the model unchanged."""
    before = {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        fps.attach(model, selection)
    assert {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [name for name, _ in model.named_modules()] == modules


def test_refuses_to_attach():
    model = Classifier()
    selection = selected(model)
    refused(
        Classifier(classes=6), selected(Classifier(), 0.2) | Selection({"x": selection["hidden.weight"]}), ValueError, "'x'"
    )
    refused(model, Selection({}), ValueError, "selection is empty")
    wrong = WeightSelection.from_mask(torch.ones(20, 13, dtype=torch.bool))
    refused(model, Selection({"hidden.weight": wrong}), ValueError, r"hidden.weight has shape \[20, 12\] here")
    refused(
        model, {"norm.weight": torch.ones(12, dtype=torch.bool)}, ValueError, "linear maps and convolutions are attached"
    )
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        fps.attach("model", selection)

    model.hidden.weight_selected = 1
    refused(model, selection, ValueError, "hidden.weight cannot be attached: hidden has a weight_selected of its own")
    del model.hidden.weight_selected

    parametrizations.spectral_norm(model.hidden)
    name = "hidden.parametrizations.weight.original"
    refused(model, {name: torch.ones(20, 12, dtype=torch.bool)}, TypeError, "belongs to a parametrization")


def test_refuses_weights_without_plain_values():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    refused(model, {"weight": torch.ones(4, 4, dtype=torch.bool)}, ValueError, "weight is on the meta device")
    model = nn.Linear(4, 4).double()
    refused(
        model,
        {"weight": torch.ones(4, 4, dtype=torch.bool)},
        TypeError,
        "weight cannot be tuned: its dtype is torch.float64",
    )

    class Quantised(nn.Parameter):
        pass

    model = nn.Linear(4, 4)
    model.weight = Quantised(model.weight.detach())
    refused(model, {"weight": torch.ones(4, 4, dtype=torch.bool)}, TypeError, "it is a Quantised")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    both = {"0.weight": torch.ones(4, 4, dtype=torch.bool), "1.weight": torch.ones(4, 4, dtype=torch.bool)}
    refused(tied, both, ValueError, "0.weight and 1.weight are one parameter")
    scripted = torch.jit.script(nn.Linear(4, 4))
    refused(scripted, {"weight": torch.ones(4, 4, dtype=torch.bool)}, TypeError, "scripted module")


def test_refuses_to_attach_twice():
    model = Classifier()
    selection = selected(model)
    tuner = fps.attach(model, selection)
    refused(model, selection, ValueError, "attached already")
    refused(model, selection.exclude("embed.*", "out.*"), ValueError, "hidden.weight is attached already")
    tuner.detach()
    fps.attach(model, selection)


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_an_optimizer_of_before_is_refused(make):
    model = Classifier()
    optimizer = make(model.parameters(), lr=0.1)
    tuner = fps.attach(model, selected(model))
    loss_of(model, labelled()).backward()
    before = copy_of(model)
    with pytest.raises(ValueError, match="made before attach.*embed.weight"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    everything = torch.optim.SGD(model.parameters(), lr=0.1)  # the frozen weights too: they have no gradients
    everything.step()
    assert not torch.equal(tuner.compact["embed.weight"], before["embed.weight_selected.values"])


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_no_step_after_detach(make):
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    optimizer = make(tuner.parameters(), lr=0.1)
    loss_of(model, labelled()).backward()
    tuner.detach()
    before = copy_of(model)
    with pytest.raises(ValueError, match="the tuner of embed.weight is detached"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_values_on_another_device_are_refused():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    model.hidden.weight_selected.to("meta")
    with pytest.raises(ValueError, match="hidden.weight is on cpu, its selected values are on meta"):
        model(images())
    with pytest.raises(ValueError, match="hidden.weight is on cpu, its selected values are on meta"):
        tuner.write_back()


def test_attached_weights_are_not_pickled():
    model = nn.Linear(4, 4)
    fps.attach(model, {"weight": torch.eye(4, dtype=torch.bool)})
    with pytest.raises(TypeError, match="weight is attached and cannot be pickled"):
        copy.copy(model.weight)


def test_state_of_another_tuner_is_refused():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    state = tuner.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match="hidden.weight is in one of the two only"):
        tuner.load_state_dict({name: value for name, value in state.items() if name != "hidden.weight"})
    with pytest.raises(ValueError, match=r"hidden.weight has \[1\] values"):
        tuner.load_state_dict({**{n: v + 1 for n, v in state.items()}, "hidden.weight": torch.ones(1)})
    assert all(torch.equal(value, before[name]) for name, value in tuner.state_dict().items())


def test_selecting_again_while_attached():
    model, x = Classifier(), images()
    tuner = fps.attach(model, fps.select(model, [x], budget=fps.PerNeuron(2)))
    again = fps.select(model, [x], budget=fps.PerNeuron(2))
    assert again.keys() == tuner.compact.keys()
    for name in tuner.compact:
        assert torch.equal(again[name].columns, tuner.selection[name].columns)
