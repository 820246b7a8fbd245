"""Weights that go where nobody can see them multiply: they are not chosen from, and it is said why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionMeta

import fps_kernels as fps


class FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        return None, None, None


@torch.jit.script
def scripted_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w, b)


@torch.library.custom_op("fps_test::linear", mutates_args=())
def registered_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w, b).clone()


class Layer(nn.Linear):
    """A linear layer that multiplies in a way of its own."""

    def __init__(self, multiply) -> None:
        super().__init__(8, 8)
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.weight, self.bias)


def network(multiply) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Layer(multiply), nn.ReLU(), nn.Linear(8, 3))


HIDING = {
    "FusedLinear.apply": FusedLinear.apply,
    "scripted_linear": scripted_linear,
    "fps_test.linear": registered_linear,
    "FusedLinear.apply, and F.linear": lambda x, w, b: FusedLinear.apply(x, w, b) + F.linear(x, w, b),
}


@pytest.mark.parametrize("name", list(HIDING))
def test_a_weight_in_a_function_of_which_nobody_sees_the_inside(name):
    model, x = network(HIDING[name]), torch.randn(5, 6)
    selection = fps.select(model, [x], budget=fps.PerNeuron(2), dense=(), progress=False, include="*")
    assert list(selection) == ["0.weight", "4.weight"]
    assert f"it is used in {name.partition(',')[0]}" in selection.skipped["2.weight"].replace("torch.ops.", "")
    assert "cannot be trained" in selection.skipped["2.weight"]
    fps.attach(model, selection)


def test_nothing_stays_watched():
    """Whatever the model's forward pass does: classes, functions and scripts are what they were."""

    def fails(x, w, b):
        raise ZeroDivisionError("in the middle")

    before = torch._C.ScriptFunction.__dict__["__call__"]
    for multiply in (fails, FusedLinear.apply):
        model = network(multiply)
        try:
            fps.calibrate(model, [torch.randn(5, 6)], progress=False)
        except ValueError as error:
            assert "in the middle" in str(error)  # noqa: PT017 one of two does not fail
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert "__getattribute__" not in vars(FunctionMeta)
        assert torch._C.ScriptFunction.__dict__["__call__"] is before


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w, b: torch.vmap(lambda row: F.linear(row, w, b))(x),
        lambda x, w, b: F.linear(x, w, b) + 0 * torch.func.grad(lambda r: F.linear(r, w).sum())(x.detach()),
    ],
    ids=["only there", "elsewhere, too"],
)
def test_transforms_of_functions_inside_of_a_model(multiply):
    """As models do that build their masks by vmap: what is multiplied there cannot be looked at, and nothing else fails."""
    model, x = network(multiply), torch.randn(5, 6)
    stats = fps.calibrate(model, [x], progress=False)
    plain = network(F.linear)
    plain.load_state_dict(model.state_dict())
    expected = fps.calibrate(plain, [x], progress=False)
    for name in ("0.weight", "4.weight"):
        torch.testing.assert_close(stats[name].norm, expected[name].norm)
    if "2.weight" in stats:
        assert torch.equal(stats["2.weight"].norm, expected["2.weight"].norm)
    else:
        assert "inside a function transform such as torch.vmap" in stats.unused["2.weight"]


def test_weights_that_a_transform_maps_over():
    """Experts that ``torch.vmap`` goes through: what it gives to the function is no weight any more."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.experts = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x):
            return torch.vmap(F.linear, in_dims=(None, 0))(self.first(x), self.experts)

    stats = fps.calibrate(Experts(), [torch.randn(5, 6)], progress=False)
    assert list(stats) == ["first.weight"]
    assert "torch.vmap(), which cannot be intercepted" in stats.unused["experts"]


def test_choosing_in_inference_mode_makes_ordinary_tensors():
    model, x = network(F.linear), torch.randn(5, 6)
    with torch.inference_mode():
        stats = fps.calibrate(model, [torch.randn(5, 6)], progress=False)
        selections = [fps.select(model, [x], progress=False), fps.select(model, stats=stats, scorer=fps.Random())]
        assert torch.is_inference_mode_enabled()
    assert not any(s.norm.is_inference() for s in stats.values())
    for chosen in (w for selection in selections for w in selection.values()):
        assert not chosen.columns.is_inference()
        assert not chosen.row_offsets.is_inference()


def test_a_layer_may_change_a_batch_that_was_made_in_inference_mode():
    model = network(lambda x, w, b: F.linear(x, w, b))
    with torch.inference_mode():
        x = torch.randn(5, 6)
        kept = x.clone()
        fps.calibrate(nn.Sequential(nn.ReLU(inplace=True), model), [x], progress=False)
    assert torch.equal(x, kept)


def test_a_transform_around_other_things_changes_nothing():
    model = network(lambda x, w, b: F.linear(x + torch.vmap(lambda row: row * 0)(x), w, b))
    assert "2.weight" in fps.calibrate(model, [torch.randn(5, 6)], progress=False)


def test_choosing_under_inference_mode():
    """It is a forward pass; what it gives is attached and trained outside."""
    model, x = network(F.linear), torch.randn(5, 6)
    expected = fps.select(model, [x], budget=fps.PerNeuron(2), progress=False)
    with torch.inference_mode():
        selection = fps.select(model, [x], budget=fps.PerNeuron(2), progress=False)
    for name, chosen in expected.items():
        assert torch.equal(chosen.columns, selection[name].columns)
    tuner = fps.attach(model, selection)
    model(x).sum().backward()
    fps.MaskedAdamW(tuner).step()
    with torch.inference_mode():
        made_there = network(F.linear)
    selection = fps.select(made_there, [x], budget=fps.PerNeuron(2), progress=False)
    with pytest.raises(ValueError, match="0.weight was made under torch.inference_mode"):
        fps.attach(made_there, selection)


def test_statistics_are_the_same_however_weights_are_watched():
    """Where somebody else refers to the memory of a weight, every function is looked at instead of the weights."""
    model, x = network(F.linear), [torch.randn(5, 6), torch.randn(3, 6)]
    expected = fps.calibrate(model, x, progress=False)
    other = copy.deepcopy(model)
    references = [p.detach() for p in other.parameters()]
    found = fps.calibrate(other, x, progress=False)
    for name, stats in expected.items():
        assert torch.equal(found[name].norm, stats.norm)
        assert found[name].rows == stats.rows
        assert found[name].calls == stats.calls
    del references


def test_an_attached_model_is_calibrated():
    model, x = network(F.linear), torch.randn(5, 6)
    expected = fps.calibrate(model, [x], progress=False)
    tuner = fps.attach(model, fps.select(model, [x], budget=fps.PerNeuron(2), progress=False))
    found = fps.calibrate(model, [x], progress=False)
    for name, stats in expected.items():
        assert torch.equal(found[name].norm, stats.norm)
    before = tuner.compact["0.weight"].detach().clone()
    tuner.compact["0.weight"].data.add_(1.0)
    assert not torch.equal(fps.calibrate(model, [x], progress=False)["2.weight"].norm, expected["2.weight"].norm)
    assert not torch.equal(tuner.compact["0.weight"].detach(), before)
