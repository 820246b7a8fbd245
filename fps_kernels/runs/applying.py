"""Weights of a base model with a delta applied, as a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fps_kernels.deltas.delta import Delta
from fps_kernels.runs.checkpoints import is_torchs, read_checkpoint
from fps_kernels.runs.models import names_of, timm_model
from fps_kernels.runs.progress import note, warnings_in_lines
from fps_kernels.runs.tuned import Tuned
from fps_kernels.storage.atomic import replaced_at_once


@dataclass(frozen=True)
class Applied:
    """What was written.

    Attributes:
        entries: numbers that the delta holds.
        weights: in which some entries were chosen.
        dense: parameters that were trained whole.
        buffers: that training changed.
        new: names that the base lacks or has in another shape.
    """

    entries: int
    weights: int
    dense: int
    buffers: int
    new: tuple[str, ...]


def apply_delta(path: Path, base: Path, output: Path, dtype: torch.dtype | None) -> Applied:
    """Write a checkpoint of the tuned model.

    Of an architecture of timm it loads by ``timm.create_model(..., checkpoint_path=...)`` at the image size that was tuned
    for, and its metadata has the names of the classes. Of other models the base's tensors are taken as they are.

    Args:
        path: the delta.
        base: weights of the base.
        output: a safetensors file.
        dtype: of floating-point weights; the base's own if not given.

    Raises:
        ValueError: a base that lacks what the delta needs, or has it in another shape.
    """
    delta = Delta.load(path)
    tensors, metadata = _base(delta, path, base)
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    usual = _usual(tensors)
    if usual in (torch.bfloat16, torch.float16) and dtype is None:
        name = str(usual).removeprefix("torch.")
        note(f"values are rounded to {name}, which the base has: --dtype fp32 keeps them as they were tuned")
    new = [n for n, v in delta.dense.items() if n not in tensors or tensors[n].shape != v.shape]
    for name in new:
        if name in tensors:
            note(f"{name}: {list(tensors[name].shape)} in the base is replaced by {list(delta.dense[name].shape)}")
        tensors[name] = torch.empty_like(delta.dense[name], dtype=usual)
    # Old checkpoints lack the counters of batch norms, and those of a part of the model lack more.
    lacking = {n: b for n, b in delta.buffers.items() if n not in tensors}
    tensors |= {n: torch.empty_like(b, dtype=usual if b.is_floating_point() else None) for n, b in lacking.items()}
    with warnings_in_lines():
        delta.write_into(tensors)
    with replaced_at_once(output) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, {**metadata, "format": "pt"})
    return Applied(delta.entries, len(delta.values), len(delta.dense), len(delta.buffers), (*new, *lacking))


def _base(delta: Delta, path: Path, base: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The base's tensors and metadata."""
    about = delta.selection.description
    tuned = Tuned.of(delta, path) if {"model", "image_size", "classes"} <= about.keys() else None
    if tuned is None or not tuned.is_timms:
        return read_checkpoint(base), _metadata(base)
    tensors = read_checkpoint(base, names_of(tuned.model))
    metadata = _metadata(base) | {"model": tuned.model, "image_size": str(tuned.image_size), "classes": about["classes"]}
    return _as_timm_has_it(delta, tuned, base, tensors), metadata


def _metadata(base: Path) -> dict[str, str]:
    if is_torchs(base):
        return {}
    with safe_open(base, framework="pt") as file:
        return dict(file.metadata() or {})


def _as_timm_has_it(delta: Delta, tuned: Tuned, base: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, and position embeddings of the image size; heads are still those of the base."""
    usual = _usual(tensors)
    found: dict[str, Tensor] = {}
    model = timm_model(tuned.model, base, len(tuned.classes), tuned.image_size, tensors=tensors)
    for name, t in model.state_dict().items():
        before = tensors.get(name)
        if name in delta.dense and (before is None or before.shape != t.shape):
            if before is not None:
                found[name] = before
            continue
        if before is not None and before.shape != t.shape:
            note(f"{name}: {list(before.shape)} in the base is {list(t.shape)} for images of {tuned.image_size}")
        dtype = before.dtype if before is not None else usual if t.is_floating_point() else t.dtype
        found[name] = t.to(dtype)
    return found


def _usual(tensors: dict[str, Tensor]) -> torch.dtype:
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()]
    return max(set(floats), key=floats.count, default=torch.float32)
