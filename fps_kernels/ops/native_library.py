"""The C++ library of ``csrc/``: found, loaded, and called through ctypes. What it computes is in :mod:`.native`.

ctypes releases the GIL during a call. The library is torch-free; it is loaded after torch, so that both share the one
OpenMP runtime that torch brings along, and ``torch.set_num_threads`` holds for both. ``FPS_CPU_ISA`` (``base``, ``avx2``
or ``avx512``) caps the instruction set, which otherwise is the best that the processor has.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

ABI = 8
ISAS = ("base", "avx2", "avx512")
LIBRARY = "libfps_kernels.so"

_OUT_OF_MEMORY, _WRONG_COUNT = 1, 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P, _N, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES: dict[str, list[Any]] = {
    "fps_abi": [],
    "fps_best_isa": [],
    "fps_isa": [],
    "fps_set_isa": [_INT],
    "fps_column_norm": [_P, _P, _N, _INT],
    "fps_column_norm_conv2d": [_P, _P, _P, _N, _INT],
    "fps_score_topk": [_P, _N, _P, _INT],
    "fps_score_kth": [_P, _N, _N, _P, _P, _P, _INT],
    "fps_score_counts": [_P, _N, _P, _P, _P, _INT],
    "fps_score_select": [_P, _P, _N, _P, _P, _INT],
    "fps_sampled_grad": [_P, _P, _P, _P, _P, _P, _INT],
    "fps_linear_gradients": [ctypes.c_char_p, _INT],
    "fps_sparse_delta_matmul": [_P, _P, _P, _INT],
    "fps_scatter_values": [_P, _P, _N, _INT],
    "fps_masked_adamw": [_P, _N, _P, _INT],
    "fps_agree_values": [_P, _N, _INT],
    "fps_pack_groups": [_P, _N, _N, _P, _P, _INT],
    "fps_unpack_groups": [_P, _P, _N, _P, _N, _N, _INT],
}


class AdamW(ctypes.Structure):
    """``AdamW`` in ``csrc/kernels.h``."""

    _fields_ = (
        ("lrs", _P),
        ("weight_decays", _P),
        ("beta1", _DOUBLE),
        ("beta2", _DOUBLE),
        ("eps", _DOUBLE),
        ("maximize", _N),
        ("grad_scale", _P),
        ("found_inf", _P),
        ("zero_grads", _N),
    )


def _find() -> Path | None:
    # An editable install keeps the library in site-packages and the sources elsewhere: the package's path has both.
    package = importlib.util.find_spec(__name__.partition(".")[0])
    assert package is not None
    for folder in package.submodule_search_locations or ():
        path = Path(folder) / LIBRARY
        if path.is_file():
            return path
    return None


def _isa_cap() -> int:
    name = os.environ.get("FPS_CPU_ISA") or ISAS[-1]
    if name not in ISAS:
        raise ValueError(f"the environment variable FPS_CPU_ISA must be one of {', '.join(ISAS)}, got {name!r}")
    return ISAS.index(name)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None`` and the reason why there is none."""
    cap = _isa_cap()
    path = _find()
    if path is None:
        return None, f"{LIBRARY} was not built when fps_kernels was installed"
    try:
        loaded = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            getattr(loaded, name).argtypes = argtypes
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if loaded.fps_abi() != ABI:
        return None, f"{path} belongs to another version of fps_kernels (ABI {loaded.fps_abi()}, needed {ABI})"
    loaded.fps_set_isa(min(cap, loaded.fps_best_isa()))
    return loaded, ""


def unavailable_reason() -> str | None:
    """``None`` where the library is loaded, otherwise why it is not.

    Raises:
        RuntimeError: there is no library although ``FPS_REQUIRE_NATIVE=1``.
        ValueError: ``FPS_CPU_ISA`` is no instruction set.
    """
    loaded, reason = _load()
    if loaded is not None:
        return None
    if os.environ.get("FPS_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"FPS_REQUIRE_NATIVE=1, but {reason}")
    return reason


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it was not built, or belongs to another version.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return loaded


def isa() -> str:
    """The instruction set that the kernels run on now."""
    return ISAS[library().fps_isa()]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor has and the library was built for, from the least to the best."""
    return ISAS[: library().fps_best_isa() + 1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels inside the ``with`` block on one instruction set, in all threads. ``FPS_CPU_ISA`` does not cap it.

    Raises:
        ValueError: the processor does not have it.
    """
    if name not in supported_isas():
        raise ValueError(f"use_isa(name) must be one of {', '.join(supported_isas())} on this processor, got {name!r}")
    previous = library().fps_set_isa(ISAS.index(name))
    try:
        yield
    finally:
        library().fps_set_isa(previous)


def check(status: int, message: str = "") -> None:
    """Raise what the status of a call says: ``MemoryError``, ``ValueError(message)`` or ``RuntimeError``."""
    if status == _OUT_OF_MEMORY:
        raise MemoryError("fps_kernels: no memory for the scratch of a native kernel")
    if status == _WRONG_COUNT:
        raise ValueError(message)
    if status:
        raise RuntimeError(f"fps_kernels: native kernel failed with status {status}")


def table(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    """The fields of structures in ``csrc/kernels.h``, all of them 8 bytes wide."""
    values = tuple(values)
    return (ctypes.c_int64 * len(values))(*values)
