"""Weights from files as people have them: safetensors, and torch's own files, of which only tensors are read."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fps_kernels.runs.progress import note

TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "teacher",
    "student",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.", "net.", "teacher.", "base_model.model.")


def read_checkpoint(path: Path, expected: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names.

    A file of torch is read with ``weights_only=True``: no code in it is run. What holds the weights beside other things
    (``state_dict``, ``model``, ...) is opened, and a prefix of names (``module.``, ``backbone.``, ...) is taken off if the
    model knows more of them without it.

    Args:
        path: a safetensors file, or one of torch, which ends with ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.tar``.
        expected: the names of the model; empty: prefixes stay.

    Raises:
        ValueError: no such file, a damaged one, one that needs code to be read, or one without tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    if is_torchs(path):
        found = _opened(path, _read_torch(path))
    else:
        try:
            found = load_file(path)
        except SafetensorError as error:
            endings = ", ".join(TORCH)
            raise ValueError(
                f"{path}: no safetensors file, or damaged: {error} (files of torch end with {endings})"
            ) from error
    return _without_prefix(path, found, expected)


def is_torchs(path: Path) -> bool:
    """Whether a file is one of torch, by its name; all others are safetensors files."""
    return path.suffix.lower() in TORCH


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(
            [Namespace]
        ):  # options of a script: many checkpoints have them, as plain values
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it meets: KeyError, EOFError, UnpicklingError, ...
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text:
            raise ValueError(
                f"{path} holds more than tensors, and reading it would run code: load it where you trust it, and save its "
                "state_dict() with safetensors.torch.save_file"
            ) from error
        raise ValueError(f"{path} is no checkpoint of torch, or damaged: {_reason(text) or repr(error)}") from error


def _reason(text: str) -> str:
    """The last part of torch's message that says something of the file."""
    lines = [line.strip() for line in text.partition("Check the documentation")[0].splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _opened(path: Path, content: Any) -> dict[str, Tensor]:
    """What holds the tensors, however deep it lies."""
    inside: list[str] = []
    while isinstance(content, Mapping):
        tensors = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
        key = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None or len(tensors) > len(content) / 2:
            if not tensors:
                break
            if inside:
                note(f"{path}: weights are those under {' / '.join(inside)}")
            return tensors
        inside.append(key)
        content = content[key]
    where = f" under {' / '.join(inside)}" if inside else ""
    held = f": it has {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else ""
    raise ValueError(f"{path} holds no weights by name{where}{held}")


def _without_prefix(path: Path, tensors: dict[str, Tensor], expected: frozenset[str]) -> dict[str, Tensor]:
    """Names as the model has them, as far as taking off prefixes does it."""
    taken = ""

    def known(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in expected for name in tensors)

    while more := [p for p in _PREFIXES if any(name.startswith(taken + p) for name in tensors)]:
        # One prefix may stand before another: that by which most names start, then on from there.
        longest = max(more, key=lambda p: sum(name.startswith(taken + p) for name in tensors))
        if known(taken) and known(taken + longest) <= known(taken):
            break
        taken += longest
    if not taken or not known(taken):
        return tensors
    own = {name[len(taken) :]: t for name, t in tensors.items() if name.startswith(taken)}
    others = len(tensors) - len(own)
    note(f"{path}: took {taken} off the names" + (f", and left out {others} without it" if others else ""))
    return own
