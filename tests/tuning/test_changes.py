"""``attach``: weights and values that others change, replace or convert behind the tuner's back."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.tuning import step_hooks
from tests.support.models import Classifier, images, labelled
from tests.support.tolerances import assert_sums_close
from tests.support.training import RATES, loss_of, selected, train


def attached() -> tuple[nn.Module, fps.Tuner, torch.Tensor]:
    """A model, its tuner, and the mask of the entries chosen in ``hidden.weight``."""
    model = Classifier()
    selection = selected(model)
    return model, fps.attach(model, selection), selection.masks()["hidden.weight"]


def held(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    return model.hidden.weight.detach()[mask]


@pytest.mark.parametrize("then", ["forward", "step", "state_dict", "detach"])
def test_a_weight_that_is_written_moves_its_values(then):
    model, tuner, mask = attached()
    values = tuner.compact["hidden.weight"]
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
    loss_of(model, labelled()).backward()
    with torch.no_grad():
        model.hidden.weight.mul_(2)  # as whoever clips or initialises weights does
    expected = held(model, mask).clone()
    {
        "forward": lambda: model(images()),
        "step": optimizer.step,
        "state_dict": model.state_dict,
        "detach": tuner.detach,
    }[then]()
    assert torch.equal(held(model, mask), expected)
    assert torch.equal(values.detach(), expected)


def test_weights_stay_frozen_when_a_whole_model_is_unfrozen():
    model, tuner, _ = attached()
    model.requires_grad_(True)
    for p in model.parameters():
        p.requires_grad = True
    assert not any(model.get_parameter(name).requires_grad for name in tuner.compact)
    loss_of(model, labelled()).backward()
    assert all(model.get_parameter(name).grad is None for name in tuner.compact)


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_a_replaced_weight_is_noticed(make):
    model, tuner, _ = attached()
    optimizer = make(tuner.parameters(), lr=0.1)
    loss_of(model, labelled()).backward()
    model.hidden.weight = nn.Parameter(torch.randn(20, 12))
    before = {name: p.detach().clone() for name, p in tuner.named_parameters()}
    with pytest.raises(ValueError, match=r"hidden.weight was replaced since attach\(\)"):
        optimizer.step()
    assert all(torch.equal(p.detach(), before[name]) for name, p in tuner.named_parameters())
    with pytest.raises(ValueError, match="hidden.weight was replaced"):
        tuner.write_back()
    tuner.detach()  # still possible
    fps.attach(model, selected(model))


def test_allocating_anew_does_not_touch_the_indices():
    model, tuner, _ = attached()
    before = {name: (w.row_offsets.clone(), w.columns.clone()) for name, w in tuner.selection.items()}
    model.to_empty(device="cpu")  # what kernels trust as indices must not be what memory happens to hold
    for name, w in tuner.selection.items():
        assert torch.equal(w.row_offsets, before[name][0])
        assert torch.equal(w.columns, before[name][1])


def test_an_input_that_was_changed_in_place_is_not_computed_again_from_before():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

        def forward(self, x):
            h = F.gelu(self.first(x))
            h.detach().mul_(3)  # autograd does not see it: the GELU's node still stands for the values of before
            return self.second(h)

    model, x = Scaled(), torch.randn(7, 6)
    loss = lambda: model(x).square().sum()  # noqa: E731
    loss().backward()
    dense = model.second.weight.grad.clone()
    model.zero_grad()
    mask = torch.rand(5, 12) < 0.3
    tuner = fps.attach(model, {"second.weight": mask})
    loss().backward()
    assert_sums_close(tuner.compact["second.weight"].grad, dense[mask], 1e-4)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: torch.cat([w, w]),
        lambda w, x: torch.stack((w, w), 0).sum(0),
        lambda w, x: torch.linalg.svd(w).S,
        lambda w, x: w.max(1).values,
    ],
)
def test_a_gradient_lost_inside_a_list_or_a_named_tuple_is_an_error(use):
    model = nn.Linear(4, 6)
    with fps.attach(model, {"weight": torch.rand(6, 4) < 0.5}):
        with pytest.raises(RuntimeError, match="gradient reached weight through .* which attach"):
            use(model.weight, None).sum().backward()
        with torch.no_grad():
            use(model.weight, None)


@pytest.mark.parametrize(
    "write",
    [
        lambda w, t: t.copy_(w),
        lambda w, t: t.add_(w),
        lambda w, t: t.lerp_(w, 0.5),
        lambda w, t: t.__setitem__(slice(None), w),
        lambda w, t: torch.mul(w, 2, out=t),
    ],
)
def test_a_weight_is_read_into_a_buffer(write):
    """As averages of weights do, with gradients enabled. A tensor that is part of a computation is another matter."""
    model, target = nn.Linear(4, 6), torch.zeros(6, 4)
    plain, expected = model.weight.detach().clone(), torch.zeros(6, 4)
    with fps.attach(model, {"weight": torch.rand(6, 4) < 0.5}):
        write(model.weight, target)
        write(plain, expected)
        assert torch.equal(target, expected)
        assert not target.requires_grad
        part = torch.zeros(6, 4, requires_grad=True) * 1.0
        with pytest.raises(RuntimeError, match=r"gradient reached weight through|don't support automatic differentiation"):
            write(model.weight, part)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_weights_of_containers_are_refused(container):
    """They would run the child that holds the values."""
    model = container([nn.Linear(4, 4)]) if container is nn.ModuleList else container(nn.Linear(4, 4))
    model.register_parameter("weight", nn.Parameter(torch.randn(4, 4)))
    children = list(model)
    with pytest.raises(TypeError, match=f"weight belongs to the model itself, a {container.__name__}"):
        fps.attach(model, {"weight": torch.ones(4, 4, dtype=torch.bool)})
    assert list(model) == children
    assert type(model.weight) is nn.Parameter


def test_cross_attention_compiles():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, q, k, v):
            return self.attention(q, k, v, need_weights=False)[0]

    model, inputs = Cross(), [torch.randn(2, 5, 8) for _ in range(3)]
    mask = torch.rand(24, 8) < 0.2
    tuner = fps.attach(model, {"attention.in_proj_weight": mask})
    values = tuner.compact["attention.in_proj_weight"]
    model(*inputs).square().sum().backward()
    expected = values.grad.clone()
    values.grad = None
    torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs).square().sum().backward()
    assert_sums_close(values.grad, expected, 1e-4)


def test_a_second_tuner_is_refused():
    model, tuner, _ = attached()
    rest = selected(model)
    with pytest.raises(ValueError, match="is attached already: detach its tuner first"):
        fps.attach(model, {"embed.weight": rest.masks()["embed.weight"]})
    train(model, fps.MaskedAdamW(tuner, **RATES), [labelled()])


def test_compact_values_live_no_longer_than_they_are_held(monkeypatch):
    """The hooks of steps, which every optimizer of the process runs, look at nothing once none live."""
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    entries = weakref.ref(tuner.compact["hidden.weight"].selected_entries)
    assert entries() in step_hooks.LIVING
    tuner.detach()
    del tuner, model
    gc.collect()
    assert entries() is None
    monkeypatch.setattr(step_hooks, "LIVING", weakref.WeakSet())
    step_hooks._before_step(None, (), {})
    step_hooks._after_step(None, (), {})
