"""Weights that are normalised before they multiply: the gradient goes through the normalisation, and none is dense."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import fps_kernels as fps
from tests.support.tolerances import assert_sums_close


class Standardised(nn.Conv2d):
    """As timm's StdConv2d, with a gain as its ScaledStdConv2d."""

    def __init__(self, *args, gain: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.gain is None else (self.gain * 0.3).view(-1)
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(module)


# Name -> the layer, the shape of its input, the name of the weight in it.
LAYERS = {
    "standardised": (lambda: Standardised(4, 6, 3, stride=2), (2, 4, 9, 8), "weight"),
    "standardised, no bias": (lambda: Standardised(4, 6, 3, bias=False), (2, 4, 9, 8), "weight"),
    "standardised with a gain": (lambda: Standardised(4, 6, 3, gain=True), (2, 4, 9, 8), "weight"),
    "standardised, grouped": (lambda: Standardised(4, 6, 3, groups=2, gain=True, padding=1), (2, 4, 9, 8), "weight"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), (2, 4, 9), "parametrizations.weight.original1"
    ),
    "weight norm of kernel positions": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2, dilation=2), dim=2),
        (2, 4, 9), "parametrizations.weight.original1",
    ),
    "weight norm of channels": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, stride=2), dim=1), (2, 4, 9, 8),
        "parametrizations.weight.original1",
    ),
    "weight norm of a transposed convolution": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 4, 2, 1)), (2, 4, 9),
        "parametrizations.weight.original1",
    ),
    "weight norm of a transposed convolution's neurons": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 2, 2), dim=1), (2, 4, 5, 4),
        "parametrizations.weight.original1",
    ),
    "weight norm, linear": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 6)), (2, 5, 4), "parametrizations.weight.original1"
    ),
    "weight norm, volumes": (
        lambda: parametrizations.weight_norm(nn.Conv3d(4, 6, 2)), (2, 4, 4, 5, 4), "parametrizations.weight.original1"
    ),
    "weight norm of old": (lambda: old_weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 9, 8), "weight_v"),
}  # fmt: skip


def made(name: str) -> tuple[nn.Sequential, Tensor, str]:
    torch.manual_seed(sum(map(ord, name)))
    make, shape, leaf = LAYERS[name]
    before = nn.Linear(shape[-1], shape[-1])
    return nn.Sequential(before, make(), nn.Tanh()), torch.randn(shape), f"1.{leaf}"


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_chosen_and_trained(name, backend):
    (model, x, weight), (dense, _, _) = made(name), made(name)
    others = [other for other in ("1.gain", "1.bias", "0.bias") if other in dict(model.named_parameters())]
    with fps.use_backend(backend):
        selection = fps.select(model, [x], budget=fps.PerNeuron(3), include=weight, dense=others, progress=False)
        entries = selection[weight]
        tuner = fps.attach(model, selection)
        assert torch.equal(model(x), dense(x))
        model(x).square().sum().backward()
    dense(x).square().sum().backward()
    parameters = dict(dense.named_parameters())
    (value,) = tuner.compact.values()
    assert_sums_close(value.grad, entries.of(parameters[weight].grad), 2e-5)
    for other, p in tuner.dense.items():
        assert_sums_close(p.grad, parameters[other].grad, 2e-5, name=other)
    assert model.get_parameter(weight).grad is None
    before = model.get_parameter(weight).detach().clone()
    fps.MaskedAdamW(tuner, lr=0.01).step()
    after, mask = model.get_parameter(weight).detach(), entries.mask()
    assert torch.equal(after[~mask], before[~mask])
    assert not torch.equal(after[mask], before[mask])
    assert f"{weight}" in model.state_dict()
    assert not any("selected" in key for key in model.state_dict())
    tuner.detach()
    assert not any("selected" in key for key, _ in model.named_modules())


@pytest.mark.parametrize(
    "name", ["standardised with a gain", "weight norm", "weight norm of kernel positions", "weight norm of channels"]
)
def test_functional_calls_and_copies(name):
    model, x, weight = made(name)
    selection = fps.select(model, [x], budget=fps.PerNeuron(3), include=weight, dense=[], progress=False)
    dense = copy.deepcopy(model)
    fps.attach(model, selection)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), dense(x))
    moved = {key: p + 0.1 for key, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        dense.get_parameter(weight).add_(0.1 * selection[weight].mask())
    assert torch.allclose(torch.func.functional_call(model, moved, (x,)), dense(x), atol=1e-5)
    with pytest.raises(RuntimeError, match="attach\\(\\) has no second derivatives of that"):
        torch.autograd.grad(model(x).sum(), list(fps.tuner_of(model).parameters()), create_graph=True)


def test_norms_of_other_dimensions_are_said():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3), dim=2), nn.Flatten(), nn.Linear(150, 3))
    selection = fps.select(model, [torch.randn(2, 4, 7, 7)], dense=[], progress=False)
    name = "0.parametrizations.weight.original1"
    assert selection.skipped[name].startswith("it reached conv2d() normalised along dimension 2")
    fps.attach(model, {name: torch.rand(6, 4, 3, 3) < 0.5})
    with pytest.raises(RuntimeError, match="through torch.nn.functional.conv2d"):
        model(torch.randn(2, 4, 7, 7)).sum().backward()
