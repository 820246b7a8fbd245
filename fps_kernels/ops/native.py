"""The native CPU backend: calls the C++ library of ``csrc/`` through ctypes. Definitions: :mod:`.reference`.

ctypes releases the GIL during a call. The library is torch-free; it is loaded after torch, so that both share the one
OpenMP runtime that torch brings along, and ``torch.set_num_threads`` holds for both. ``FPS_CPU_ISA`` (``base``, ``avx2``
or ``avx512``) caps the instruction set, which otherwise is the best that the processor has.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fps_kernels.ops.records import AdamWStep, Convolution

ABI = 3
ISAS = ("base", "avx2", "avx512")
LIBRARY = "libfps_kernels.so"

_OUT_OF_MEMORY, _WRONG_COUNT = 1, 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTWISE = Convolution((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
_ORDS = {1.0: 1, 2.0: 2, float("inf"): 3}

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
    "fps_score_select": [_P, _P, _N, _N, _P, _P, _INT],
    "fps_sampled_grad": [_P, _P, _P, _P, _P, _P, _INT],
    "fps_scatter_values": [_P, _P, _N, _INT],
    "fps_masked_adamw": [_P, _N, _P, _INT],
}


class _AdamW(ctypes.Structure):
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


# ------------------------------------------------------------------------------------------------ the library


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
        library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            getattr(library, name).argtypes = argtypes
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if library.fps_abi() != ABI:
        return None, f"{path} belongs to another version of fps_kernels (ABI {library.fps_abi()}, needed {ABI})"
    library.fps_set_isa(min(cap, library.fps_best_isa()))
    return library, ""


def unavailable_reason() -> str | None:
    """``None`` where the library is loaded, otherwise why it is not.

    Raises:
        RuntimeError: there is no library although ``FPS_REQUIRE_NATIVE=1``.
        ValueError: ``FPS_CPU_ISA`` is no instruction set.
    """
    library, reason = _load()
    if library is not None:
        return None
    if os.environ.get("FPS_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"FPS_REQUIRE_NATIVE=1, but {reason}")
    return reason


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return library


def isa() -> str:
    """The instruction set that the kernels run on now."""
    return ISAS[_library().fps_isa()]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor has and the library was built for, from the least to the best."""
    return ISAS[: _library().fps_best_isa() + 1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels inside the ``with`` block on one instruction set, in all threads. ``FPS_CPU_ISA`` does not cap it.

    Raises:
        ValueError: the processor does not have it.
    """
    if name not in supported_isas():
        raise ValueError(f"use_isa(name) must be one of {', '.join(supported_isas())} on this processor, got {name!r}")
    previous = _library().fps_set_isa(ISAS.index(name))
    try:
        yield
    finally:
        _library().fps_set_isa(previous)


def _check(status: int, message: str = "") -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("fps_kernels: no memory for the scratch of a native kernel")
    if status == _WRONG_COUNT:
        raise ValueError(message)
    if status:
        raise RuntimeError(f"fps_kernels: native kernel failed with status {status}")


def _table(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    values = tuple(values)
    return (ctypes.c_int64 * len(values))(*values)


def _matrix(W: Tensor, a: Tensor | None = None) -> tuple[int, ...]:
    """The fields of ``Matrix`` in ``csrc/kernels.h``."""
    factors = (0, 1) if a is None else (a.data_ptr(), a.shape[0])
    return (W.data_ptr(), *W.shape, *W.stride(), _DTYPES[W.dtype], *factors)


# ------------------------------------------------------------------------------------------------ norms


def column_norm_(x: Tensor, acc: Tensor, ord: float) -> None:
    """:func:`.reference.column_norm_` in one read of ``x`` ``[M, C]``, any strides."""
    _check(_library().fps_column_norm(_table(_matrix(x)), acc.data_ptr(), _ORDS[ord], torch.get_num_threads()))


def _images(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The fields of ``Images`` in ``csrc/kernels.h``."""
    return _table((x.data_ptr(), *x.shape, *x.stride(), _DTYPES[x.dtype]))


def _geometry(convolution: Convolution, x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The fields of ``Convolution`` in ``csrc/kernels.h``."""
    kernel_size, stride, (top, _, left, _), dilation, groups = convolution
    return _table((*kernel_size, *stride, *dilation, top, left, *convolution.output_size(x), groups))


def column_norm_conv2d_(
    x: Tensor,
    acc: Tensor,
    convolution: Convolution,
    ord: float,
) -> None:
    """:func:`.reference.column_norm_conv2d_` in one read of ``x`` ``[B, C_in, H, W]``.

    A column belongs to one channel whatever its group, and ``acc`` ``[groups, C_in/groups * kh * kw]`` lists the channels in
    order: the groups need no treatment of their own.
    """
    geometry = _geometry(convolution, x)
    _check(_library().fps_column_norm_conv2d(_images(x), geometry, acc.data_ptr(), _ORDS[ord], torch.get_num_threads()))


# ------------------------------------------------------------------------------------------------ scores


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """:func:`.reference.score_topk` in one read of ``W`` ``[O, C]``."""
    columns = torch.empty(W.shape[0], k, dtype=torch.int32)
    _check(_library().fps_score_topk(_table(_matrix(W, a)), k, columns.data_ptr(), torch.get_num_threads()))
    return columns


def score_kth(weights: list[Tensor], factors: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.reference.score_kth`, exact, usually in one read of the weights."""
    n = len(weights)
    table = _table(field for W, a in zip(weights, factors, strict=True) for field in _matrix(W, a))
    threshold = torch.empty((), dtype=torch.float32)
    counts = torch.empty(2, n, dtype=torch.int64)
    greater, equal = counts[0], counts[1].clone()
    status = _library().fps_score_kth(
        table, n, k, threshold.data_ptr(), greater.data_ptr(), equal.data_ptr(), torch.get_num_threads()
    )
    _check(status)
    return threshold, greater, equal


def score_select(W: Tensor, a: Tensor, threshold: Tensor, ties: int, nnz: int) -> tuple[Tensor, Tensor]:
    """:func:`.reference.score_select` in two reads of ``W`` ``[O, C]``."""
    row_offsets = torch.empty(W.shape[0] + 1, dtype=torch.int32)
    columns = torch.empty(nnz, dtype=torch.int32)
    status = _library().fps_score_select(
        _table(_matrix(W, a)),
        threshold.data_ptr(),
        ties,
        nnz,
        row_offsets.data_ptr(),
        columns.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status, f"nnz must be the number of entries chosen, got {nnz}")
    return row_offsets, columns


# ------------------------------------------------------------------------------------------------ gradients


def sampled_grad(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """:func:`.reference.sampled_grad`: a 1x1 convolution of one image, one row high, whose channels are the columns."""
    image_gy, image_x = (one.t()[None, :, None] for one in (gy, x))
    return sampled_grad_conv2d(image_gy, image_x, row_offsets, columns, _POINTWISE)


def sampled_grad_conv2d(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    convolution: Convolution,
) -> Tensor:
    """:func:`.reference.sampled_grad_conv2d` in one read of ``gy`` ``[B, O, H_out, W_out]``; ``x`` is not unfolded."""
    grad = torch.empty(columns.shape[0], dtype=torch.float32)
    status = _library().fps_sampled_grad(
        _images(gy),
        _images(x),
        _geometry(convolution, x),
        row_offsets.data_ptr(),
        columns.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)
    return grad


# ------------------------------------------------------------------------------------------------ updates


def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """:func:`.reference.scatter_values_`, touching only the cache lines of ``W`` that hold selected entries."""
    update = _update(W, values, row_offsets, columns, (0, 0, 0, 0))
    status = _library().fps_scatter_values(update, values.data_ptr(), _DTYPES[values.dtype], torch.get_num_threads())
    _check(status)


def _update_fields(
    W: Tensor, grad: Tensor, row_offsets: Tensor, columns: Tensor, state: tuple[int, int, int, int]
) -> tuple[int, ...]:
    """The fields of ``Update`` in ``csrc/kernels.h``."""
    compact = grad.dim() == 1
    grad_strides = (0, 0) if compact else grad.stride()
    return (
        W.data_ptr(),
        *W.stride(),
        _DTYPES[W.dtype],
        grad.data_ptr(),
        *grad_strides,
        _DTYPES[grad.dtype],
        compact,
        row_offsets.data_ptr(),
        columns.data_ptr(),
        W.shape[0],
        columns.shape[0],
        *state,
    )


def _update(
    W: Tensor, grad: Tensor, row_offsets: Tensor, columns: Tensor, state: tuple[int, int, int, int]
) -> ctypes.Array[ctypes.c_int64]:
    return _table(_update_fields(W, grad, row_offsets, columns, state))


def masked_adamw_(step: AdamWStep) -> None:
    """:func:`.reference.masked_adamw_` for all tensors in one call."""
    fields: list[int] = []
    for W, grad, offsets, cols, master, exp_avg, exp_avg_sq, count in zip(*step[:8], strict=True):
        held = master.data_ptr() if master.numel() else 0
        state = (held, exp_avg.data_ptr(), exp_avg_sq.data_ptr(), count.data_ptr())
        fields.extend(_update_fields(W, grad, offsets, cols, state))
    n = len(step.weights)
    how = _AdamW(
        step.lrs.data_ptr(),
        ctypes.addressof(decays := (ctypes.c_double * n)(*step.weight_decays)),
        step.beta1,
        step.beta2,
        step.eps,
        step.maximize,
        None if step.grad_scale is None else step.grad_scale.data_ptr(),
        None if step.found_inf is None else step.found_inf.data_ptr(),
        step.zero_grads,
    )
    _check(_library().fps_masked_adamw(_table(fields), n, ctypes.byref(how), torch.get_num_threads()))
    del decays  # lived until here


# ------------------------------------------------------------------------------------------------ prepared calls


class ColumnNorms:
    """:func:`column_norm_` into one accumulator again and again, prepared so that a call costs little beside its work.

    Attributes:
        norm: float64 ``[1, C]``: what is added to.
        rows: rows that were added.
        calls: calls that added some.
    """

    __slots__ = ("_address", "_columns", "_matrix", "_order", "_run", "calls", "norm", "rows")

    def __init__(self, norm: Tensor, columns: int, address: int, order: int, run: Any) -> None:
        self.norm, self.rows, self.calls = norm, 0, 0
        self._columns, self._address, self._order, self._run = columns, address, order, run
        self._matrix: Any = None

    def add(self, x: Tensor) -> bool:
        """Add the column norms of ``[..., C]``. One thread at a time.

        Args:
            x: a plain tensor: not one of a subclass, of a function transform, or without memory.

        Returns:
            Whether it did. It does nothing where ``x`` is empty, or no contiguous float32, bfloat16 or float16 tensor on the
            CPU with so many columns.
        """
        dtype, columns = _DTYPES.get(x.dtype), self._columns
        if dtype is None or not x.is_cpu or x.layout is not torch.strided or x.size(-1) != columns or not x.is_contiguous():
            return False
        rows, at = x.numel() // columns if columns else 0, x.data_ptr()
        if not rows or not at:
            return False
        matrix = self._matrix
        if matrix is None:
            matrix = self._matrix = _table((at, rows, columns, columns, 1, dtype, 0, 1))
        else:
            matrix[0], matrix[1], matrix[5] = at, rows, dtype
        if status := self._run(matrix, self._address, self._order, torch.get_num_threads()):
            _check(status)
        self.rows += rows
        self.calls += 1
        return True


def column_norms(columns: Sequence[int], ord: float) -> tuple[Tensor, list[ColumnNorms]]:
    """An accumulator of zeros for inputs of each of these many columns, and the one tensor that all of them lie in."""
    memory = torch.zeros(1, sum(columns), dtype=torch.float64)
    run, order, address, made = _library().fps_column_norm, _ORDS[ord], memory.data_ptr(), []
    for norm, count in zip(memory.split(list(columns), dim=1), columns, strict=True):
        made.append(ColumnNorms(norm, count, address, order, run))
        address += 8 * count
    return memory, made
