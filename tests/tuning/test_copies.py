"""Copies of an attached model are attached on their own, and a detached one is like any other."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fps_kernels as fps
from tests.support.gradients import random_selection


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 3))


def attached(model: nn.Module) -> fps.Tuner:
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    return fps.attach(model, random_selection(model, names, density=0.3, dense=("3.bias",)))


def step(model: nn.Module, tuner: fps.Tuner, x: torch.Tensor, steps: int = 2) -> None:
    optimizer = fps.MaskedAdamW(tuner, lr=0.1)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_best_so_far():
    """Copied in the middle of training: it stays as it was, has a tuner, and can be trained further."""
    model, x = network(), torch.randn(4, 6)
    base = copy.deepcopy(model)
    tuner = attached(model)
    step(model, tuner, x)
    best = copy.deepcopy(model)
    then = {name: value.clone() for name, value in best.state_dict().items()}
    step(model, tuner, x)
    own = fps.tuner_of(best)
    assert own is not tuner
    assert own.model is best
    assert all(torch.equal(value, then[name]) for name, value in best.state_dict().items())
    assert fps.diff(base, best).entries <= own.selection.nnz + 3
    step(best, own, x)
    assert all(torch.equal(p, tuner.compact[name]) for name, p in own.compact.items())  # it took the same way
    for name, values in own.compact.items():
        assert torch.equal(best.get_parameter(name).detach()[own.selection[name].mask()], values.detach())
    own.detach()
    assert all(type(p) is nn.Parameter for p in best.parameters())
    step(model, tuner, x)
    tuner.detach()


def test_a_copy_follows_its_own_values():
    model, x = network(), torch.randn(4, 6)
    attached(model)
    model(x)
    other = copy.deepcopy(model)
    fps.tuner_of(other).compact["3.weight"].data.add_(1.0)
    before = model(x)
    assert not torch.equal(other(x), before)
    assert torch.equal(model(x), before)


def test_a_copied_tuner_has_a_copied_model():
    model, x = network(), torch.randn(4, 6)
    tuner = copy.deepcopy(attached(model))
    assert tuner.model is not model
    step(tuner.model, tuner, x)
    assert fps.tuner_of(tuner.model) is tuner


def test_a_copied_part_is_a_part():
    """And not the model around it; it follows its values without a tuner."""
    model, x = network(), torch.randn(4, 6)
    attached(model)
    model[2](torch.randn(2, 8))  # by itself, so that it looks for itself
    part = copy.deepcopy(model[2])
    values = part[0].weight_selected.values
    y = part(torch.ones(1, 8))
    values.data.add_(1.0)
    assert not torch.equal(part(torch.ones(1, 8)), y)
    assert part[0].weight_selected.tuner is None
    optimizer = fps.MaskedAdamW([values], lr=0.1)
    for _ in range(2):
        part(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert torch.equal(part[0].weight.detach()[part[0].weight_selected.selection.mask()], values.detach())
    with pytest.raises(ValueError, match="takes an attached model, got a Sequential: attach it first"):
        fps.tuner_of(part)
    model(x)


def test_tuner_of():
    model = network()
    with pytest.raises(ValueError, match=r"tuner_of\(model\) takes an attached model, got a Sequential: attach it first"):
        fps.tuner_of(model)
    tuner = fps.attach(model[2], {"0.weight": torch.ones(8, 8, dtype=torch.bool)})
    assert fps.tuner_of(model) is tuner
    fps.attach(model[3], {"weight": torch.ones(3, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="2 of its parts are"):
        fps.tuner_of(model)
    tuner.detach()
    assert fps.tuner_of(model) is not tuner


def test_a_detached_model_is_pickled():
    model, x = network(), torch.randn(4, 6)
    before = set(vars(model))
    tuner = attached(model)
    step(model, tuner, x)
    with pytest.raises(TypeError, match="is attached and cannot be pickled"):
        pickle.dumps(model)
    tuner.detach()
    assert set(vars(model)) == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), model(x))
    assert all(type(p) is nn.Parameter for p in loaded.parameters())


def test_a_moved_and_copied_model_has_the_plan_of_a_fast_step():
    model, x = network(), torch.randn(4, 6)
    tuner = attached(model)
    for one, own in ((model, tuner), (copy.deepcopy(model), None)):
        own = own or fps.tuner_of(one)
        one.to(torch.bfloat16)
        optimizer = fps.MaskedAdamW(own, lr=0.1)
        for _ in range(2):
            one(x.bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer._plans is not None
