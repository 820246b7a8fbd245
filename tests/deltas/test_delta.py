"""Delta files: exact on models, small on disk, distrustful when read."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.file_format import FORMAT
from fps_kernels.deltas.making import delta_of
from fps_kernels.storage import checked_file
from fps_kernels.storage.bits import bits_for, pack, packed_size, unpack
from tests.support.models import Classifier, images, labelled
from tests.support.training import RATES, copy_of, selected, train


def tuned(
    density: float = 0.1, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
) -> tuple[nn.Module, fps.Tuner]:
    """A base model, and a tuner of a copy that was trained a little."""
    base = (model or Classifier()).to(dtype)
    twin = copy.deepcopy(base)
    tuner = fps.attach(twin, fps.select(twin, [images().to(dtype)], budget=fps.PerTensor(0.1)))
    train(twin, fps.MaskedAdamW(tuner, **RATES), [labelled() for _ in range(3)])
    return base, tuner


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


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


def two_deltas() -> tuple[nn.Module, list]:
    base = nn.Sequential(nn.Linear(4, 3))
    deltas = []
    for columns, shift in (([0, 1], 1.0), ([1, 2], 2.0)):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model[0].weight[:, columns] += shift
        deltas.append(fps.diff(base, model))
    return base, deltas


@pytest.mark.parametrize(("on_conflict", "shift"), [("first", 1.0), ("last", 2.0), ("mean", 1.5)])
def test_merging(on_conflict, shift):
    base, deltas = two_deltas()
    merged, conflicts = fps.merge(deltas, on_conflict)
    assert [(c.name, c.entries) for c in conflicts] == [("0.weight", 3)]
    assert conflicts[0].largest == pytest.approx(1.0, abs=1e-5)
    expected = base[0].weight.detach().clone()
    expected[:, 0] += 1
    expected[:, 1] += shift
    expected[:, 2] += 2
    merged.apply_(base)
    torch.testing.assert_close(base[0].weight.detach(), expected)


def test_merging_what_agrees_or_not():
    _, deltas = two_deltas()
    with pytest.raises(ValueError, match="3 entries of 0.weight have different values"):
        fps.merge(deltas)
    merged, conflicts = fps.merge([deltas[0], deltas[0]])
    assert conflicts == []
    assert torch.equal(merged.values["0.weight"], deltas[0].values["0.weight"])
    with pytest.raises(ValueError, match="no delta"):
        fps.merge([])
    with pytest.raises(ValueError, match="on_conflict must be"):
        fps.merge(deltas, "newest")
    with pytest.raises(ValueError, match="different base models"):
        fps.merge([deltas[0], two_deltas()[1][0]])


def test_merging_whole_parameters():
    base = nn.Linear(3, 2)
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        models[0].weight += 1
        models[1].weight[0, 0] += 5
        models[1].bias += 1
    merged, conflicts = fps.merge([fps.diff(base, m) for m in models], "last")
    assert [c.name for c in conflicts] == ["weight"]
    expected = models[0].weight.detach().clone()
    expected[0, 0] = models[1].weight[0, 0]
    torch.testing.assert_close(merged.dense["weight"], expected)
    torch.testing.assert_close(merged.dense["bias"], models[1].bias.detach())


# ------------------------------------------------------------------------------------------------ files


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(0, 3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing(numbers, more):
    bits = min(31, bits_for(max(numbers, default=0)) + more)
    packed = pack(torch.tensor(numbers, dtype=torch.int64), bits)
    assert packed.numel() == packed_size(len(numbers), bits)
    assert unpack(packed, len(numbers), bits).tolist() == numbers


def test_packing_of_many():
    numbers = torch.randint(2**11, (2**20 + 13,))
    assert torch.equal(unpack(pack(numbers, 11), len(numbers), 11).long(), numbers)
    with pytest.raises(ValueError, match="hold no"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("delta") / "task.safetensors"
    fps.save_delta(tuned()[1], path)
    return path.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused(saved, tmp_path, data):
    """Whatever byte is changed, left out or added: a ValueError that names the file, and never anything else."""
    kind = data.draw(st.sampled_from(["cut", "flip", "add", "header"]))
    damaged = bytearray(saved)
    if kind == "cut":
        damaged = damaged[: data.draw(st.integers(0, len(saved) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(saved) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "add":
        damaged += data.draw(st.binary(min_size=1, max_size=20))
    else:
        damaged[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        if bytes(damaged) == saved:
            return
    path = tmp_path / "damaged"
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="damaged"):
        fps.load_delta(path)


LIES = [
    (("weights", "hidden.weight", "entries"), 10**12),
    (("weights", "hidden.weight", "entries"), -1),
    (("weights", "hidden.weight", "entries"), 1.5),
    (("weights", "hidden.weight", "shape"), [10**9, 10**9]),
    (("weights", "hidden.weight", "shape"), [2, 3]),
    (("weights", "hidden.weight", "shape"), "large"),
    (("weights", "hidden.weight", "shape"), []),
    (("weights", "hidden.weight", "row_bits"), 63),
    (("weights", "hidden.weight", "row_bits"), 0),
    (("weights", "hidden.weight", "row_length"), 10**15),
    (("weights", "hidden.weight", "bfloat16"), True),
    (("weights", "hidden.weight"), None),
    (("dense", "head.bias", "shape"), [0, 2**70]),
    (("dense", "head.bias", "shape"), [10**12]),
    (("dense", "head.bias"), 7),
    (("weights",), []),
    (("base",), 3),
    (("versions",), "new"),
]


@pytest.mark.parametrize(("where", "what"), LIES)
def test_lies_are_refused(saved, tmp_path, where, what):
    """A file whose checksum is right and whose description is not: no allocation of the size that it claims."""
    path = tmp_path / "lie"
    path.write_bytes(saved)
    content, tensors = checked_file.read(path, FORMAT, "delta")
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = what
    checked_file.write(path, FORMAT, content, tensors)
    with pytest.raises(ValueError, match="lie is damaged"):
        fps.load_delta(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no safetensors file, or is cut off"):
        fps.load_delta(path)
    selected(Classifier()).save(path)
    with pytest.raises(ValueError, match="holds no delta: its format is 'fps_kernels.selection.1'"):
        fps.load_delta(path)
    with pytest.raises(FileNotFoundError):
        fps.load_delta(tmp_path / "none")


def test_a_killed_save_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "task.safetensors"
    program = f"""
import torch
from fps_kernels.storage import checked_file
print("ready", flush=True)
i = 0
while True:
    checked_file.write({str(path)!r}, "test", {{"i": i}}, {{"x": torch.full((1_000_000,), float(i))}})
    i += 1
"""
    for wait in (0.0, 0.05, 0.12):
        running = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
        )
        assert running.stdout.readline() == "ready\n"
        time.sleep(wait)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if path.exists():
            content, tensors = checked_file.read(path, "test", "test")
            assert (tensors["x"] == content["i"]).all()


def test_a_save_keeps_links_and_permissions(tmp_path):
    _, tuner = tuned()
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    fps.save_delta(tuner, real)
    real.chmod(0o640)
    link.symlink_to(real)
    fps.save_delta(tuner, link, dtype=torch.bfloat16)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert fps.load_delta(real).values["hidden.weight"].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing to write task.safetensors to"):
        fps.save_delta(tuner, tmp_path / "missing" / "task.safetensors")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    path = tmp_path / "d"
    _, tuner = tuned()
    fps.save_delta(tuner, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        fps.save_delta(tuner, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
