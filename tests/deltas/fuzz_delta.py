"""Coverage-guided fuzzing of what reads delta and selection files; not part of the suite, since it has no end.

    pip install atheris
    python tests/deltas/fuzz_delta.py -max_total_time=3600 CORPUS_FOLDER

Any bytes must either load or be refused with a ``ValueError``. Every other input is given a right checksum first, so that
what lies behind the checksum is reached as well.
"""

import json
import sys
import tempfile
import types
from pathlib import Path

import atheris
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas import delta, file_format
from fps_kernels.deltas.delta import Delta
from fps_kernels.selection import Selection, selection, weight_selection
from fps_kernels.storage import bits, checked_file
from fps_kernels.weights import matrix

FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / "input.safetensors"


def instrument(*modules: types.ModuleType) -> None:
    """Watch which branches an input takes. Function by function, since an editable install has a loader of its own."""
    owners = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    for owner in (*modules, *(o for o in owners if o.__module__.startswith("fps_kernels"))):
        for value in vars(owner).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and function.__module__.startswith("fps_kernels"):
                atheris.instrument_func(function)


def mended(data: bytes) -> bytes:
    """The same content with a right checksum, if it can be read as far as that."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = load(data)
        described, kind = metadata["content"], metadata["format"]
        checksum = checked_file._checksum(kind, described, tensors)
        return save(tensors, {"format": kind, "content": described, "sha256": checksum})
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return data


def one_input(data: bytes) -> None:
    mend, data = data[:1] < b"\x80", data[1:]
    FILE.write_bytes(mended(data) if mend else data)
    for kind in (Delta, Selection):
        try:
            loaded = kind.load(FILE)
        except ValueError:
            continue
        chosen = loaded.selection if isinstance(loaded, Delta) else loaded
        for w in chosen.weights.values():
            assert w.columns.numel() == int(w.row_offsets[-1])
            assert not w.nnz or int(w.columns.max()) < w.layout.shape[1]
        if isinstance(loaded, Delta):
            assert sum(b.nbytes for b in loaded.buffers.values()) <= len(data)


def seeds() -> list[bytes]:
    """Small valid files of both kinds."""
    torch.manual_seed(0)
    made = []
    for budget in (fps.PerNeuron(1), fps.PerTensor(0.3)):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        chosen = fps.select(model, [torch.randn(2, 3)], budget=budget)
        chosen.save(FILE)
        made.append(FILE.read_bytes())
        fps.save_delta(fps.attach(model, chosen), FILE, dtype=torch.bfloat16 if budget == fps.PerNeuron(1) else None)
        made.append(FILE.read_bytes())
    normed = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    tuner = fps.attach(normed, fps.select(normed, [torch.randn(2, 3)], budget=fps.PerNeuron(1)))
    normed.train()(torch.randn(4, 3))
    fps.save_delta(tuner, FILE, buffers=True)
    made.append(FILE.read_bytes())
    return made


if __name__ == "__main__":
    corpus = next((Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()):
            for first in (b"\x00", b"\xff"):
                (corpus / f"seed{number}{first.hex()}").write_bytes(first + seed)
    instrument(bits, checked_file, delta, file_format, matrix, selection, weight_selection)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
