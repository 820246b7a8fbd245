"""``attach(beside=True)``: entries added beside weights that nobody writes to, as quantised ones."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fps_kernels as fps
from tests.support.models import Classifier, images


class Rounded(nn.Module):
    """A linear layer of its own kind: rows of int8 with a scale each, and no parameter called weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)


class MLP(nn.Module):
    """Each layer's input is made in another way: what is kept of it differs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(40, 64), nn.LayerNorm(64), nn.Linear(64, 96)
        self.third, self.head = nn.Linear(96, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(self.third(F.gelu(self.second(self.norm(x)))).mean(1))


QUANTISED = ("first", "second", "third")


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in QUANTISED:
        setattr(model, name, make(getattr(model, name)))
    return model


def _four_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _eight_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _torchao(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in QUANTISED)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "own kind": lambda model: replaced(model, Rounded),
    "bitsandbytes NF4": lambda model: replaced(model, _four_bits),
    "bitsandbytes int8": lambda model: replaced(model, _eight_bits),
    "torchao int8": _torchao,
}


def inputs(count: int = 6) -> Tensor:
    return torch.randn(count, 9, 40)


def base() -> MLP:
    torch.manual_seed(2)
    return MLP()


def chosen(k: int = 4, **options: Any) -> fps.Selection:
    return fps.select(base(), [inputs()], budget=fps.PerNeuron(k), progress=False, **options)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Whatever layers hold that is no plain trained parameter, as bits."""
    held = {}
    for name, module in model.named_modules():
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and name in QUANTISED and key != "bias":
                held[f"{name}.{key}"] = (t.dequantize() if hasattr(t, "tensor_data_names") else t.detach()).clone()
    return held


@pytest.mark.parametrize("way", list(WAYS))
def test_every_base(way):
    """Nothing changes at first; gradients are those of a dense model with the same numbers; the base keeps its bits."""
    x, y = inputs(), torch.arange(6) % 5
    selection = chosen()
    model = WAYS[way](base()).train()
    before, expected = stored(model), model(x).detach()
    tuner = fps.attach(model, selection, beside=True)
    assert torch.equal(model(x), expected)
    assert not any("_selected" in name for name in model.state_dict())
    with torch.no_grad():
        for values in tuner.compact.values():
            values.normal_(0, 0.05)
    tuned = model(x.requires_grad_())
    F.cross_entropy(tuned, y).backward()
    gradients = {name: p.grad.clone() for name, p in tuner.named_parameters()}
    of_x, x.grad = x.grad, None

    fps.save_delta(tuner, "beside.safetensors")
    delta = fps.load_delta("beside.safetensors")
    assert delta.added
    other = WAYS[way](base()).train()
    dense = fps.merge_into_dense(other, delta) if way != "plain" else merged(other, delta)
    for p in dense.parameters():
        p.requires_grad_()
    found = dense(x)
    bound = 0.03 if way == "bitsandbytes int8" else 1e-4  # which rounds its inputs, too
    assert (found - tuned).abs().max() <= bound * found.abs().max()
    F.cross_entropy(found, y).backward()
    for name, w in selection.items():
        reference = dense.get_parameter(name).grad[w.rows(), w.columns.long()]
        assert (gradients[name] - reference).norm() <= 3 * bound * reference.norm(), name
    for name in selection.dense:
        assert (gradients[name] - dense.get_parameter(name).grad).norm() <= 3 * bound * gradients[name].norm(), name
    assert (of_x - x.grad).norm() <= 3 * bound * of_x.norm()

    optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x.detach()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    after = stored(model)
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    tuner.detach()
    assert not any("_selected" in name for name, _ in model.named_modules())


def merged(model: nn.Module, delta: fps.Delta) -> nn.Module:
    with torch.no_grad():
        for name, w in delta.selection.items():
            model.get_parameter(name)[w.rows(), w.columns.long()] += delta.values[name]
        for name, values in delta.dense.items():
            model.get_parameter(name).copy_(values)
    return model


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_goes_on_from_its_delta():
    x, y = inputs(), torch.arange(6) % 5
    model = WAYS["own kind"](base())
    tuner = fps.attach(model, chosen(), beside=True)
    optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    fps.save_delta(tuner, "task.safetensors")
    delta = fps.load_delta("task.safetensors")
    again = WAYS["own kind"](base())
    with torch.no_grad():
        for name, values in delta.dense.items():
            again.get_parameter(name).copy_(values)
    other = fps.attach(again, delta.selection, beside=True)
    other.load_state_dict(delta.values)
    assert torch.equal(again(x), model(x))
    copied = copy.deepcopy(again)
    assert torch.equal(copied(x), model(x))
    with pytest.raises(ValueError, match="of another selection"):
        other.load_state_dict({name: torch.zeros(1) for name in other.compact})
    with pytest.raises(ValueError, match="added beside a base that is never written"):
        delta.apply_(base())
    with pytest.raises(ValueError, match="added beside a base that is never written"):
        fps.merge([delta, delta])
    with pytest.raises(ValueError, match="is attached"):
        fps.merge_into_dense(again, delta)
    plain = fps.attach(base(), chosen())
    fps.save_delta(plain, "plain.safetensors")
    with pytest.raises(ValueError, match="the delta holds weights"):
        fps.merge_into_dense(WAYS["own kind"](base()), fps.load_delta("plain.safetensors"))


@pytest.mark.parametrize("way", ["bitsandbytes NF4", "torchao int8", "own kind"])
def test_choosing_from_the_dequantised_copy(way):
    """It shares most entries with a choice from the weights before."""
    x = inputs(40)
    before = fps.select(base(), [x], budget=fps.PerNeuron(4), progress=False)
    after = fps.select(fps.merge_into_dense(WAYS[way](base())), [x], budget=fps.PerNeuron(4), progress=False)
    assert list(after) == list(before)
    assert before.overlap(after) > 0.7
    fps.attach(WAYS[way](base()), after, beside=True)


def test_bytes_beside_those_of_lora():
    """Four entries a neuron: values, gradients, moments and indices, against two matrices of rank 8 with the same."""
    width = 512
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(width, width, bias=False))
    selection = fps.Selection({"layer.weight": fps.WeightSelection.from_mask(torch.rand(width, width).argsort(1) < 4)}, ())
    tuner = fps.attach(model, selection, beside=True)
    optimizer = fps.MaskedAdamW(tuner)
    model(torch.randn(50, width)).sum().backward()
    optimizer.step()
    (entries,) = tuner._entries.values()
    held = [entries.values, entries.values.grad, *optimizer.state[entries.values].values(), entries.order, entries.distinct]
    held += [entries.selection.row_offsets, entries.selection.columns]
    size = sum(t.numel() * t.element_size() for t in held if t is not None)
    assert size <= 0.4 * 16 * 2 * 8 * width, size


def test_sixteen_bits_autocast_and_no_gradients():
    x = inputs()
    model = WAYS["own kind"](base())
    tuner = fps.attach(model, chosen(), beside=True)
    with torch.no_grad():
        for values in tuner.compact.values():
            values.normal_(0, 0.05)
    expected = model(x).detach()
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in tuner.compact.values())
    model.to(torch.bfloat16)
    assert tuner.compact["first.weight"].dtype == torch.float32
    assert (model(x.bfloat16()).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_is_refused():
    selection = chosen()
    with pytest.raises(ValueError, match="run the loop inside of fps.kept"):
        fps.attach(base(), selection, beside=True, keep_bits=8)
    with pytest.raises(ValueError, match="has no other for other.weight"):
        fps.attach(base(), {"other.weight": torch.ones(2, 2, dtype=torch.bool)}, beside=True)
    with pytest.raises(ValueError, match=r"first.weight multiplies as \[64, 40\]"):
        fps.attach(base(), {"first.weight": torch.ones(2, 2, dtype=torch.bool)}, beside=True)
    with pytest.raises(ValueError, match="belongs to a Conv2d, of which no one knows"):
        model = Classifier()
        fps.attach(model, fps.select(model, [images()], progress=False), beside=True)
    with pytest.raises(ValueError, match="the selection is empty"):
        fps.attach(base(), {}, beside=True)
    model = base()
    tuner = fps.attach(model, selection, beside=True)
    with pytest.raises(ValueError, match="first.weight is attached already"):
        fps.attach(model, selection, beside=True)
    with pytest.raises(ValueError, match="written nowhere"):
        tuner.write_back()
    model.first = nn.Linear(40, 64)
    with pytest.raises(ValueError, match="first.weight was replaced since attach"):
        fps.save_delta(tuner, "lost.safetensors")

    class Wrong(nn.Module):
        in_features, out_features = 40, 64

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = base()
    model.first = Wrong()
    model.norm = nn.Identity()
    fps.attach(model, {"first.weight": torch.ones(64, 40, dtype=torch.bool)}, beside=True)
    with pytest.raises(RuntimeError, match=r"no linear map of \[..., 40\] to \[..., 64\]"):
        model(inputs())

    model = WAYS["bitsandbytes NF4"](base())
    tuner = fps.attach(model, selection, beside=True)
    model.first.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes leaves it, on some CPUs
    with pytest.raises(RuntimeError, match=r"first.weight cannot be trained: bitsandbytes has repacked its weight"):
        model(inputs())
    tuner.detach()
    with pytest.raises(ValueError, match=r"first.weight cannot be trained: bitsandbytes has repacked its weight"):
        fps.attach(model, selection, beside=True)
