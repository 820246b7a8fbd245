"""Telling base models apart, also where some parameters cannot be read."""

import copy

import torch
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.weights.fingerprint import fingerprint


class Quantised(Tensor):
    """A wrapper that computes its numbers, and knows no views of itself."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        if function is torch.ops.aten.t.default:
            return cls(args[0].codes.t())
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return function(*(a.codes.float() / 16 if isinstance(a, cls) else a for a in args))
        raise NotImplementedError(f"no {function}")


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_quantised_parameters_count_by_name_and_shape():
    quantised, other = model(), model()
    codes = torch.randint(-8, 8, (8, 6), dtype=torch.int8)
    quantised[0].weight = nn.Parameter(Quantised(codes), requires_grad=False)
    other[0].weight = nn.Parameter(Quantised(codes), requires_grad=False)
    assert fingerprint(quantised) == fingerprint(other)
    with torch.no_grad():
        other[2].weight.add_(1)
    assert fingerprint(quantised) != fingerprint(other)


def test_other_weights_of_a_quantised_model_are_tuned(tmp_path):
    net = model()
    net[0].weight = nn.Parameter(Quantised(torch.randint(-8, 8, (8, 6), dtype=torch.int8)), requires_grad=False)
    x = torch.randn(5, 6)
    selection = fps.select(net, [x], dense=[], progress=False)
    assert list(selection) == ["2.weight"]
    assert selection.skipped["0.weight"] == "it is a Quantised, not a plain tensor"
    before = net[2].weight.detach().clone()
    tuner = fps.attach(net, selection)
    net(x).square().sum().backward()
    fps.MaskedAdamW(tuner, lr=0.1).step()
    fps.save_delta(tuner, tmp_path / "delta.safetensors")
    tuner.detach()
    delta = fps.load_delta(tmp_path / "delta.safetensors")
    with torch.no_grad():
        net[2].weight.copy_(before)
    delta.apply_(net)
    assert not torch.equal(net[2].weight, before)


def test_the_same_in_float32_and_bfloat16_and_another_after_a_change():
    net = model().bfloat16()
    assert fingerprint(copy.deepcopy(net).float()) == fingerprint(net)
    assert fingerprint(model(1)) != fingerprint(model())
