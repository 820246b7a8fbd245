"""Deltas: exact on models, small on disk."""

import copy
import os

import pytest
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.making import delta_of
from tests.support.deltas import same, tuned
from tests.support.models import Classifier
from tests.support.training import copy_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path, dtype):
    base, tuner = tuned(dtype=dtype)
    before = copy_of(base)
    fps.save_delta(tuner, tmp_path / "task.safetensors")
    delta = fps.load_delta(tmp_path / "task.safetensors")
    assert repr(delta).startswith(f"Delta({tuner.selection.nnz:,} entries of {len(tuner.compact)} weights")
    assert delta.selection.description == tuner.selection.description
    assert delta.versions["fps_kernels"] == fps.__version__
    for name, values in tuner.compact.items():
        assert torch.equal(delta.values[name], values.detach())
        assert torch.equal(delta.selection[name].columns, tuner.selection[name].columns)
        assert torch.equal(delta.selection[name].row_offsets, tuner.selection[name].row_offsets)
    delta.apply_(base)
    assert same(base, tuner.model)
    delta.revert_(base)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerNeuron(4), fps.PerTensor(0.01), fps.Global(0.01)])
def test_bytes_an_entry(tmp_path, budget):
    """At most 6 bytes an entry in float32 and 4 in bfloat16, everything included, at the size of a real layer."""
    model = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384), nn.Linear(384, 1152))
    names = ["0.weight", "2.weight", "3.weight"]
    tuner = fps.attach(model, fps.select(model, [torch.randn(8, 384)], budget=budget, include=names, dense="*.bias"))
    for dtype, most in ((torch.float32, 6), (torch.bfloat16, 4)):
        fps.save_delta(tuner, tmp_path / "d", dtype)
        assert os.path.getsize(tmp_path / "d") <= most * delta_of(tuner).entries
    assert all(v.dtype == torch.bfloat16 for v in fps.load_delta(tmp_path / "d").values.values())


def test_bfloat16_values_are_rounded(tmp_path):
    base, tuner = tuned()
    fps.save_delta(tuner, tmp_path / "d", dtype=torch.bfloat16)
    fps.load_delta(tmp_path / "d").apply_(base)
    for name, values in tuner.compact.items():
        held = base.get_parameter(name).detach()[tuner.selection.masks()[name]]
        assert torch.equal(held, values.detach().bfloat16().float())
    with pytest.raises(ValueError, match="dtype must be torch.float32 or torch.bfloat16"):
        fps.save_delta(tuner, tmp_path / "d", dtype=torch.float16)


def test_channels_last_and_transposed_weights(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    base = copy.deepcopy(model)
    tuner = fps.attach(model, fps.select(model, [{"input_ids": torch.randint(50, (2, 9))}], budget=fps.PerNeuron(2)))
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p))
    tuner.write_back()
    fps.save_delta(tuner, tmp_path / "d")
    fps.load_delta(tmp_path / "d").apply_(base)
    assert same(base, model)
    base, tuner = tuned()
    base.to(memory_format=torch.channels_last)
    delta_of(tuner).apply_(base)
    assert same(base, tuner.model)


def test_not_a_bit_is_lost_when_reverted():
    """Not even those of a NaN."""
    base, tuner = tuned(dtype=torch.bfloat16)
    base.hidden.weight.data.view(torch.int16).fill_(0x7FA5)
    before = base.hidden.weight.detach().view(torch.int16).clone()
    delta = delta_of(tuner)
    delta.apply_(base, check_base=False)
    delta.revert_(base)
    assert torch.equal(base.hidden.weight.detach().view(torch.int16), before)


def test_tasks_take_turns_on_one_base():
    base = Classifier()
    tasks = [tuned(model=base)[1] for _ in range(2)]
    deltas = [delta_of(tuner) for tuner in tasks]
    for turn in (0, 1, 0):
        deltas[turn].apply_(base)
        assert same(base, tasks[turn].model)
        deltas[turn].revert_(base)


def test_what_is_refused():
    base, tuner = tuned()
    delta = delta_of(tuner)
    other = Classifier()
    before = copy_of(other)
    with pytest.raises(ValueError, match="the delta is of another base model"):
        delta.apply_(other)
    with pytest.raises(ValueError, match="has no parameter 'embed.weight'"):
        delta.apply_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"head.weight has shape \[6, 12\] here"):
        delta.apply_(Classifier(classes=6), check_base=False)
    with pytest.raises(ValueError, match="is attached: detach its tuner first"):
        delta.apply_(tuner.model)
    with pytest.raises(ValueError, match="torch.float64"):
        delta.apply_(copy.deepcopy(base).double(), check_base=False)
    with pytest.raises(ValueError, match="not applied to this model"):
        delta.revert_(base)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    delta.apply_(other, check_base=False)
    with pytest.raises(ValueError, match="applied already"):
        delta.apply_(base)
    with pytest.raises(ValueError, match="not applied to this model"):
        delta.revert_(base)
    second = delta_of(tuned(model=base)[1])
    delta.revert_(other)
    delta.apply_(base)
    with pytest.raises(ValueError, match="is another delta applied"):
        second.apply_(base)


def test_half_precision_copy_of_the_base_is_the_same_base():
    base, tuner = tuned()
    delta = delta_of(tuner)
    delta.apply_(copy.deepcopy(base).bfloat16())


def test_a_converted_model_cannot_be_reverted():
    """The values of before would be rounded."""
    base, tuner = tuned()
    delta = delta_of(tuner)
    delta.apply_(base)
    tuned_values = copy_of(base)
    base.bfloat16()
    with pytest.raises(ValueError, match=r"was torch.float32 on cpu when the delta was applied and is torch.bfloat16"):
        delta.revert_(base)
    base.float()
    assert all(torch.equal(p, tuned_values[name].bfloat16().float()) for name, p in base.named_parameters())
    delta.revert_(base)
    for name, w in delta.selection.items():
        assert torch.equal(base.get_parameter(name)[w.mask()], copy_of(tuned(model=base)[0])[name][w.mask()])


def test_a_delta_whose_model_is_gone_can_be_applied_again():
    base, tuner = tuned()
    delta = delta_of(tuner)
    delta.apply_(copy.deepcopy(base))
    delta.apply_(base)
    twin = copy.deepcopy(delta)
    with pytest.raises(ValueError, match="not applied to this model"):
        twin.revert_(base)
    delta.revert_(base)
    twin.apply_(base)


def test_difference_of_two_models():
    base, tuner = tuned()
    tuner.detach()
    delta = fps.diff(base, tuner.model)
    for name, w in tuner.selection.items():
        assert not (delta.selection[name].mask() & ~w.mask()).any()
    assert set(delta.dense) == set(tuner.dense)
    delta.apply_(base)
    assert same(base, tuner.model)
    assert fps.diff(base, tuner.model).entries == 0
    with pytest.raises(ValueError, match="only one has"):
        fps.diff(base, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="head.weight is torch.float32"):
        fps.diff(base, Classifier(classes=7))


def test_difference_ignores_integers_that_agree():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.count = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)

    base = Counting()
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.linear.weight[0, 1] += 1
    assert fps.diff(base, changed).entries == 1
    changed.count.add_(1)
    with pytest.raises(ValueError, match=r"count is torch.int64: a delta holds float32, bfloat16 or float16"):
        fps.diff(base, changed)
