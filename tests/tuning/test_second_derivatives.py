"""Gradients of gradients, and transforms of functions: the values are parameters to all of torch's derivatives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from transformers.pytorch_utils import Conv1D

import fps_kernels as fps


class Net(nn.Module):
    """All that multiplies: an embedding, linear maps of either orientation, convolutions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 24, 3, padding=1)
        self.grouped = nn.Conv2d(24, 24, (2, 2), padding="same", groups=4)
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.inner = nn.Linear(24, 40)
        self.transposed = Conv1D(30, 40)
        self.head = nn.Linear(30, 3)

    def forward(self, x):
        x = torch.tanh(self.grouped(self.conv(x))).flatten(2).mT
        x = self.norm(x)
        x = x + self.attention(x, x, x)[0]  # with weights: torch's fused one has no second derivative
        return self.head(F.gelu(self.transposed(F.gelu(self.inner(x))))).mean(1)


def problem() -> tuple[Net, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    model = Net()
    masks = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            masks[name] = torch.rand_like(p) < 0.15
            masks[name][:, ::3] = False  # so that not all columns are needed
    return model, masks, torch.randn(4, 2, 8, 8), torch.randint(3, (4,))


def reference(model: nn.Module, values: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> Callable[..., Any]:
    def call(x: torch.Tensor) -> torch.Tensor:
        weights = {name: model.get_parameter(name).detach().masked_scatter(masks[name], values[name]) for name in values}
        return functional_call(model, weights, (x,))

    return call


def penalty(call: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((g.flatten(1).norm(dim=1) - 1).square().mean() + F.cross_entropy(call(x), t), leaves)


def hessian_vector(call: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
    gradients = torch.autograd.grad(F.cross_entropy(call(x), t), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * g.detach().sign()).sum() for g in gradients), leaves)


def third(call: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
    gradients = torch.autograd.grad(F.cross_entropy(call(x), t), leaves, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in again), leaves)


@pytest.mark.parametrize("derivative", [penalty, hessian_vector, third])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_higher_derivatives(derivative, backend):
    model, masks, x, t = problem()
    plain = copy.deepcopy(model)
    chosen = {
        name: fps.WeightSelection.from_mask(mask, (1,) if name == "transposed.weight" else (0,))
        for name, mask in masks.items()
    }
    tuner = fps.attach(model, fps.Selection(chosen))
    compact = tuner.compact
    values = {name: plain.get_parameter(name).detach()[masks[name]].clone().requires_grad_() for name in compact}
    expected = derivative(reference(plain, values, masks), x, t, list(values.values()))
    with fps.use_backend(backend):
        found = derivative(model, x, t, list(compact.values()))
    for name, ours, wanted in zip(compact, found, expected, strict=True):
        if tuner.selection[name].layout.row_dims == (1,):
            places = torch.zeros(masks[name].shape)
            places[masks[name]] = wanted
            wanted = places.t()[masks[name].t()]
        assert (ours - wanted).abs().max() <= 2e-4 * wanted.abs().max(), name


def small() -> tuple[nn.Module, fps.Tuner, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    masks = {name: torch.rand_like(p) < 0.3 for name, p in model.named_parameters() if p.dim() > 1}
    x, t = torch.randn(6, 8), torch.randint(4, (6,))
    return model, fps.attach(model, masks), masks, x, t


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_of_a_functional_call():
    model, tuner, _, x, t = small()
    F.cross_entropy(model(x), t).backward()
    found = grad(lambda values: F.cross_entropy(functional_call(model, values, (x,)), t))(values_of(model))
    for name, p in tuner.compact.items():
        torch.testing.assert_close(found[f"{name}_selected.values"], p.grad)


def test_other_values_in_a_functional_call_leave_the_model_as_it_is():
    """As in meta-learning: one step inside, whose result is a function of the values."""
    model, tuner, masks, x, t = small()
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    plain.load_state_dict(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def adapted(call, leaves):
        gradients = torch.autograd.grad(F.cross_entropy(call(leaves), t), list(leaves.values()), create_graph=True)
        fast = {name: p - 0.5 * g for (name, p), g in zip(leaves.items(), gradients, strict=True)}
        loss = F.cross_entropy(call(fast), t)
        return loss, torch.autograd.grad(loss, list(leaves.values()))

    ours = {f"{name}_selected.values": p for name, p in tuner.compact.items()}
    values = {name: plain.get_parameter(name).detach()[masks[name]].clone().requires_grad_() for name in masks}
    found = adapted(lambda v: functional_call(model, v, (x,)), ours)
    expected = adapted(lambda v: reference(plain, v, masks)(x), values)
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), plain(x))


def test_gradients_of_every_sample():
    model, tuner, _, x, t = small()

    def loss(values, one, target):
        return F.cross_entropy(functional_call(model, values, (one[None],)), target[None])

    found = vmap(grad(loss), (None, 0, 0))(values_of(model), x, t)
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), t[i : i + 1]).backward()
        for name, p in tuner.compact.items():
            torch.testing.assert_close(found[f"{name}_selected.values"][i], p.grad, rtol=1e-4, atol=1e-6)


def test_forward_derivatives():
    model, tuner, _, x, _ = small()
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    jacobian = vmap(jacrev(model))(x)
    torch.testing.assert_close(found, torch.einsum("bij,bj->bi", jacobian, tangent), rtol=1e-4, atol=1e-5)
    assert tuner.compact["0.weight"].grad is None


def test_copies_are_stacked():
    model, _, _, x, _ = small()
    parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(2)])
    found = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found[0], model(x))
    torch.testing.assert_close(found[1], model(x))
