"""Compact gradients on real architectures equal the dense gradients at the chosen entries."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fps_kernels as fps
from tests.choosing.test_models import MODELS
from tests.support.tolerances import assert_sums_close


def outputs(model: nn.Module, batch: object) -> Tensor:
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(result, Tensor):
        return result
    if (logits := getattr(result, "logits", None)) is not None:
        return logits
    return result.pooler_output


def backward(model: nn.Module, batch: object, seed: int) -> None:
    torch.manual_seed(seed)  # drop path, dropout
    model.zero_grad()
    y = outputs(model, batch)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def double_gradients(model: nn.Module, batch: object, seed: int) -> dict[str, Tensor]:
    def widened(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    model = model.double()
    backward(model, {k: widened(v) for k, v in batch.items()} if isinstance(batch, dict) else widened(batch), seed)
    return gradients(model)


def close(a: Tensor, b: Tensor, scale: Tensor, factor: float) -> bool:
    return float((a.double() - b.double()).norm()) <= factor * float(scale.double().norm())


@pytest.mark.parametrize("name", list(MODELS))
def test_compact_gradients_equal_dense_ones(name):
    model, batch = MODELS[name]()
    model.train()
    for module in model.modules():  # statistics of a batch would differ from one forward pass to the next
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    selection = fps.select(model, [batch], budget=fps.PerTensor(0.05))
    backward(model, batch, seed=1)
    dense = gradients(model)
    original = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    tuner = fps.attach(model, selection)
    assert model.state_dict().keys() == before.keys()
    backward(model, batch, seed=1)
    exact: dict[str, Tensor] = {}
    for key, values in tuner.compact.items():
        entries = selection[key]
        expected = entries.layout.matrix(dense[key])[entries.rows(), entries.columns.long()]
        assert values.grad is not None, key
        if not close(values.grad, expected, expected, 1e-5):
            # Sums whose terms cancel (in front of a softmax): as near to float64 as the dense gradient is, or nearly so.
            exact = exact or double_gradients(original, batch, seed=1)
            truth = entries.layout.matrix(exact[key])[entries.rows(), entries.columns.long()]
            assert close(values.grad, truth, expected - truth, 3), key
    for key, p in tuner.dense.items():
        if key in dense:
            assert_sums_close(p.grad, dense[key], 1e-4, key)
    trained = {*(f"{key}_selected.values" for key in tuner.compact), *tuner.dense}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained

    optimizer = fps.MaskedAdamW(tuner, lr=1e-2, weight_decay=0.1)
    masks = selection.masks()
    for _ in range(100):
        optimizer.step()
    backward(model, batch, seed=2)
    optimizer.step()
    tuner.detach()
    for key, value in model.state_dict().items():
        if key in masks:
            assert torch.equal(value[~masks[key]], before[key][~masks[key]]), key
            assert not torch.equal(value[masks[key]], before[key][masks[key]]), key
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in MODELS[name]()[0].named_parameters()}
