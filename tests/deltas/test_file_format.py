"""Delta files: distrustful when read, replaced at once when written."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.file_format import FORMAT, WITH_BUFFERS
from fps_kernels.storage import checked_file
from tests.support.deltas import tuned
from tests.support.models import Classifier
from tests.support.training import selected


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
    (("weights", "hidden.weight", "layout"), [[10**9, 10**9], [0], 1]),
    (("weights", "hidden.weight", "layout"), [[2, 3], [0], 1]),
    (("weights", "hidden.weight", "layout"), ["large", [0], 1]),
    (("weights", "hidden.weight", "layout"), [[], [0], 1]),
    (("weights", "hidden.weight", "layout"), [[20, 12], [2], 1]),
    (("weights", "hidden.weight", "layout"), [[20, 12], [1, 0], 1]),
    (("weights", "hidden.weight", "layout"), [[20, 12], [0], 3]),
    (("weights", "hidden.weight", "layout"), [[20, 12], [0], 0]),
    (("weights", "hidden.weight", "layout"), {"shape": [20, 12]}),
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


BUFFER_LIES = [
    (("buffers", "0.running_mean", "shape"), [10**12]),
    (("buffers", "0.running_mean", "shape"), [0, 2**70]),
    (("buffers", "0.running_mean", "shape"), [4]),
    (("buffers", "0.running_mean", "shape"), [-3]),
    (("buffers", "0.running_mean", "shape"), None),
    (("buffers", "0.running_mean", "dtype"), "int64"),
    (("buffers", "0.running_mean", "dtype"), "complex64"),
    (("buffers", "0.running_mean", "dtype"), ["float32"]),
    (("buffers", "0.running_mean"), 7),
    (("buffers", "1.bias"), {"shape": [0], "dtype": "float32"}),
    (("buffers",), []),
    (("buffers",), {}),
    (("buffers_left_out",), ["0.running_mean"]),
    (("buffers_left_out",), "0.running_mean"),
    (("buffers_left_out",), [7]),
]


@pytest.fixture(scope="module")
def with_buffers(tmp_path_factory):
    """What a file with buffers of three dtypes is made of: fresh for each who changes it."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].register_buffer("flags", torch.tensor([False, False]))
    tuner = fps.attach(model, fps.select(model.eval(), [torch.randn(2, 3)], include="1.weight", dense="1.bias"))
    model.train()(torch.randn(4, 3))
    model[0].flags[1] = True
    path = tmp_path_factory.mktemp("buffers") / "task.safetensors"
    fps.save_delta(tuner, path, buffers=True)
    return lambda: checked_file.read(path, WITH_BUFFERS, "delta")


@pytest.mark.parametrize(("where", "what"), BUFFER_LIES)
def test_lies_about_buffers_are_refused(with_buffers, tmp_path, where, what):
    content, tensors = with_buffers()
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = what
    checked_file.write(tmp_path / "lie", WITH_BUFFERS, content, tensors)
    with pytest.raises(ValueError, match="lie is damaged"):
        fps.load_delta(tmp_path / "lie")


def test_tensors_of_buffers_are_checked(with_buffers, tmp_path):
    def written(file_format: str = WITH_BUFFERS, **changed: torch.Tensor) -> None:
        content, tensors = with_buffers()
        checked_file.write(tmp_path / "lie", file_format, content, {**tensors, **changed})

    written()
    assert fps.load_delta(tmp_path / "lie").buffers["0.flags"].tolist() == [False, True]
    for changed, message in (
        ({"buffers_bool": torch.tensor([0, 2], dtype=torch.uint8).view(torch.bool)}, "neither 0 nor 1"),
        ({"buffers_bool": torch.zeros(2)}, "must be one-dimensional torch.bool"),
        ({"buffers_float32": torch.zeros(7)}, "1 items too many"),
        ({"buffers_float32": torch.zeros(5)}, "items left"),
        ({"buffers_int8": torch.zeros(1, dtype=torch.int8)}, "1 items too many"),
        ({"buffers_complex64": torch.zeros(1)}, "does not belong there"),
    ):
        written(**changed)
        with pytest.raises(ValueError, match=f"lie is damaged: .*{message}"):
            fps.load_delta(tmp_path / "lie")
    written(FORMAT)
    with pytest.raises(ValueError, match="lie is damaged: it has a tensor 'buffers_bool' that does not belong there"):
        fps.load_delta(tmp_path / "lie")


def test_a_buffer_that_no_file_can_hold(with_buffers, tmp_path):
    content, tensors = with_buffers()
    checked_file.write(tmp_path / "d", WITH_BUFFERS, content, tensors)
    delta = fps.load_delta(tmp_path / "d")
    delta.buffers["phase"] = torch.zeros(1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="the buffer phase is torch.complex64"):
        delta.save(tmp_path / "e")
    assert not (tmp_path / "e").exists()


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
