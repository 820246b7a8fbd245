"""Buffers that training changes: a delta holds them, or says that it does not."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.making import delta_of
from fps_kernels.storage import checked_file
from fps_kernels.weights import buffers as noted
from fps_kernels.weights.buffers import BufferNotes
from tests.support.deltas import same


class Normed(nn.Module):
    """A batch norm, and a buffer of each kind: changed in training, unchanged, out of ``state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("ratio", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("still", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen[0] = True
            self.mean += 1 / 3
            self.ratio += 0.25
            self.scratch += 1
        return self.head(F.relu(self.norm(self.stem(x))).mean((2, 3)))


CHANGED = {f"norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} | {"seen", "mean", "ratio"}


def trained(base: nn.Module) -> fps.Tuner:
    model = copy.deepcopy(base)
    tuner = fps.attach(model, fps.select(model, [torch.randn(4, 3, 8, 8)], budget=fps.PerNeuron(1), progress=False))
    optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
    model.train()
    for _ in range(3):
        F.cross_entropy(model(torch.randn(8, 3, 8, 8) * 3 + 2), torch.randint(4, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return tuner


@pytest.fixture
def base() -> nn.Module:
    return Normed().eval()


@pytest.fixture
def tuner(base) -> fps.Tuner:
    return trained(base)


def test_the_base_with_the_delta_predicts_what_the_tuned_model_does(base, tuner, tmp_path):
    before, x = copy.deepcopy(base), torch.randn(8, 3, 8, 8) + 2
    fps.save_delta(tuner, tmp_path / "d", dtype=torch.float32, buffers=True)
    delta = fps.load_delta(tmp_path / "d")
    assert set(delta.buffers) == CHANGED
    assert all(b.dtype == base.get_buffer(n).dtype for n, b in delta.buffers.items())
    assert repr(delta).endswith(", 6 buffers)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.apply_(base)
    assert same(base, tuner.model)
    assert torch.equal(base(x), tuner.model(x))
    base.train()(x)  # goes on from there
    delta.buffers.clear()  # what is taken back is what was found
    delta.revert_(base.eval())
    assert same(base, before)


def test_what_is_left_out_is_said(base, tuner, tmp_path):
    with pytest.warns(UserWarning, match=r"changed 6 buffers \(.* and 3 more\).*buffers=True holds them") as seen:
        fps.save_delta(tuner, tmp_path / "d")
    assert (len(seen), seen[0].filename) == (1, __file__)
    delta = fps.load_delta(tmp_path / "d")
    assert (set(delta.buffers_left_out), delta.buffers) == (CHANGED, {})
    assert repr(delta).endswith(", 6 changed buffers left out)")
    with pytest.warns(UserWarning, match="does not predict what the tuned model did") as seen:
        delta.apply_(base)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="6 buffers"):
        delta.write_into(dict(base.state_dict()))


def test_a_model_whose_buffers_stay_says_nothing(base, tmp_path):
    """And the file is that of a version that knew no buffers; safetensors alone decides how its metadata are ordered."""
    tuner = fps.attach(base, fps.select(base, [torch.randn(4, 3, 8, 8)], budget=fps.PerNeuron(1), progress=False))
    for p in tuner.parameters():
        p.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fps.save_delta(tuner, tmp_path / "a")
        fps.save_delta(tuner, tmp_path / "b", buffers=True)
    for file in ("a", "b"):
        content, tensors = checked_file.read(tmp_path / file, "fps_kernels.delta.1", "delta")
        assert list(content) == ["base", "weights", "dense", "description", "density", "versions"]
        assert set(tensors) == {"indices", "values_float32"}


def test_checkpoints_and_other_precisions(base, tuner):
    delta = delta_of(tuner, buffers=True)
    state = {name: t.clone() for name, t in base.state_dict().items()}
    delta.write_into(state)
    assert all(torch.equal(t, state[name]) for name, t in tuner.model.state_dict().items())
    twin, before = copy.deepcopy(base).bfloat16(), copy.deepcopy(base).bfloat16()
    delta.apply_(twin)
    assert torch.equal(twin.mean, tuner.model.mean.bfloat16())
    delta.revert_(twin)
    assert same(twin, before)


def test_a_conversion_is_no_change(base):
    notes = BufferNotes(base)
    assert notes.changed(base.bfloat16()) == {}


def test_what_does_not_fit_is_refused(base, tuner):
    delta, before = delta_of(tuner, buffers=True), copy.deepcopy(base)
    for name, wrong, message in (
        ("still", torch.zeros(3, dtype=torch.int64), None),
        ("mean", torch.zeros(4), r"the buffer mean has shape \[4\] here and \[3\]"),
        ("seen", torch.zeros(3), "the buffer seen is torch.float32 here and torch.bool"),
        ("mean", torch.zeros(1).expand(3), "the buffer mean is an expanded tensor"),
        ("mean", torch.zeros(3, device="meta"), "the buffer mean is on the meta device"),
        ("mean", None, "this one has no buffer 'mean'"),
    ):
        other = copy.deepcopy(base)
        setattr(other, name, wrong)
        if message is None:
            delta.apply_(other)
            delta.revert_(other)
            continue
        with pytest.raises(ValueError, match=message):
            delta.apply_(other)
        assert torch.equal(other.stem.weight, before.stem.weight)


def test_difference_of_two_models(base, tuner):
    tuner.detach()
    delta = fps.diff(base, tuner.model)
    assert set(delta.buffers) == CHANGED
    without = fps.diff(base, tuner.model, buffers=False)
    assert (set(without.buffers_left_out), without.buffers) == (CHANGED, {})
    delta.apply_(base)
    assert same(base, tuner.model)
    base.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="different buffers: only one has extra"):
        fps.diff(base, tuner.model)


def test_merging(base):
    first, second = (delta_of(trained(base), buffers=True) for _ in range(2))
    for how in ("error", "mean"):
        with pytest.raises(ValueError, match="different values"):
            fps.merge([first, second], how)
    merged, conflicts = fps.merge([first, second], "last")
    assert all(torch.equal(b, second.buffers[name]) for name, b in merged.buffers.items())
    found = {c.name: c.entries for c in conflicts}
    assert (found["norm.running_mean"], "seen" in found) == (6, False)
    second.buffers.clear()
    merged, _ = fps.merge([second, first], "mean")
    assert all(torch.equal(b, first.buffers[name]) for name, b in merged.buffers.items())
    left_out = delta_of(trained(base))
    assert fps.merge([left_out, second], "first")[0].buffers_left_out == left_out.buffers_left_out
    assert fps.merge([left_out, first], "first")[0].buffers_left_out == ()


def test_large_buffers_are_noticed_by_a_checksum():
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(300_001)[1:])  # more than a copy is made of, and not aligned
    model.register_buffer("bits", torch.zeros(2**20 + 3, dtype=torch.bool))
    notes = BufferNotes(model)
    assert all(note.copy is None for note in notes._notes.values())
    assert notes.changed(model) == {}
    model.mask[-1] = -0.0
    model.bits[-1] = True
    assert notes.changed(model).keys() == {"mask", "bits"}
    x = torch.randn(3 * noted._CHUNK)
    assert len({noted._checksum(t) for t in (x, x.flip(0), x.roll(1), x.roll(2 * noted._CHUNK), x.abs())}) == 5


def test_buffers_that_are_new_or_replaced(base, tmp_path):
    """What was replaced by a tensor of its shape is held; a base has no place for the others."""
    tuner = trained(base)
    model = tuner.model
    model.still = model.still + 1
    model.ratio = torch.zeros(5, dtype=torch.float16)
    model.register_buffer("late", torch.zeros(1))
    model.register_buffer("unreadable", torch.zeros(1, device="meta"))
    with pytest.warns(UserWarning, match=r"2 buffers \(ratio, late\).*has no place for them"):
        fps.save_delta(tuner, tmp_path / "d", buffers=True)
    delta = fps.load_delta(tmp_path / "d")
    assert set(delta.buffers) == CHANGED - {"ratio"} | {"still"}
    with pytest.warns(UserWarning, match="ratio, late"):
        delta.apply_(base)
    assert torch.equal(base.still, torch.arange(3) + 1)


def test_a_copy_of_an_attached_model_has_notes_of_its_own(base, tuner):
    twin = fps.tuner_of(copy.deepcopy(tuner.model))
    assert set(delta_of(twin, buffers=True).buffers) == CHANGED
