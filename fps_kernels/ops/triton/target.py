"""Which GPU a launch is for. Kernels differ by it in few places, and all ask here."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fps_kernels.ops._dispatch import interpreted

# Each rounding is the one that is written, with every version of Triton and in the interpreter. Left to itself, the compiler
# may put a product into the addition that follows: where two lanes add each other's products, it did so in one of them
# and rounded the other's first, so that the same sum had two roundings. Where an FMA is wanted, it is `tl.fma`.
AS_WRITTEN = {"enable_fp_fusion": False}

_assumed: list[str] = []


def target_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ..., or ``"interpreter"``."""
    if _assumed:
        return _assumed[-1]
    return (
        "interpreter" if interpreted() else _name(device.index if device.index is not None else torch.cuda.current_device())
    )


@cache
def _name(index: int) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return name
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def register_limit(device: torch.device, registers: int) -> dict[str, int]:
    """The option that lets a thread have up to so many registers. Left to itself, ptxas spills a few bytes where that makes
    room for one more program on an SM."""
    return {"maxnreg": registers} if target_of(device).startswith("sm_") else {}


@contextmanager
def assume(target: str) -> Iterator[None]:
    """Answer ``target`` whatever the device: how kernels are compiled for a GPU that need not be there."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()
