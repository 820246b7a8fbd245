"""Delta files: distrustful when read, replaced at once when written."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fps_kernels as fps
from fps_kernels.deltas.file_format import FORMAT
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
