"""What :class:`~fps_kernels.MaskedAdamW` refuses: options, parameters and saved states."""

import zlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fps_kernels.ops.transfers import fetched
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import MatrixLayout, is_simulated, unfit


def check_options(options: Mapping[str, Any]) -> None:
    """Options of a group."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must hold one number, got shape {list(lr.shape)}")
    elif not isinstance(lr, Real):
        raise TypeError(f"lr must be a number or a tensor, got {lr!r}")
    elif not float(lr) >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be two numbers or two tensors, got one of each: {betas!r}")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"betas[{i}] must hold one number, got shape {list(beta.shape)}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {betas}")
    for name in ("eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {options[name]}")


def check_parameter(label: str, p: Any) -> None:
    """A parameter to tune, which errors call ``label``."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(p).__name__}")
    if reason := unfit(p):
        raise TypeError(f"{label} cannot be tuned: {reason}")
    if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"{label} is an expanded tensor, whose entries share memory: give it its own with .clone()")
    try:
        memory = MatrixLayout(tuple(p.shape)).memory(p)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    if memory.positions is not None and torch.empty_like(p).stride() != p.stride():  # a gradient could not lie as it does
        raise ValueError(f"{label}: strides {p.stride()} leave gaps between its numbers: make it contiguous")


def check_state(index: int, state: Mapping[str, Any] | None, nnz: int) -> None:
    """A parameter without a gradient so far has no state; any other has all of it."""
    if not state:
        return
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if not isinstance(state.get(key), Tensor) and not (key == "step" and isinstance(state.get(key), Real)):
            raise ValueError(f"the state of parameter {index} lacks {key}")
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if key in state and tuple(state[key].shape) != (nnz,):
            raise ValueError(f"the state of parameter {index}: {key} has shape {list(state[key].shape)}, expected [{nnz}]")


def checksums(selections: Sequence[WeightSelection]) -> list[int]:
    """What tells one choice from another in a saved state, of each; the host waits for a GPU once."""
    there = [s for s in selections if not is_simulated(s.columns)]
    read = iter(fetched([t for s in there for t in (s.row_offsets, s.columns)]))
    sums = iter([zlib.crc32(next(read).numpy().tobytes(), _crc(offsets)) for offsets in read])
    return [0 if is_simulated(s.columns) else next(sums) for s in selections]


def _crc(indices: Tensor) -> int:
    return zlib.crc32(indices.numpy().tobytes())
