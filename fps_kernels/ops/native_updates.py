"""The native ops that write to selected entries. Definitions: :mod:`.reference`.

Of its tensors a call is told in a table of addresses. A prepared form keeps that table; an op makes it, and uses it once.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fps_kernels.ops import records
from fps_kernels.ops.native_library import DTYPES, AdamW, check, library, table
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Gradients

_GRAD = 8  # the gradient's address among the fields of an `Update`


def _entries(W: Tensor, row_offsets: Tensor, columns: Tensor) -> tuple[int, ...]:
    """The fields of ``Entries`` in ``csrc/kernels.h``."""
    csr = row_offsets.data_ptr(), columns.data_ptr(), W.shape[0], columns.shape[0]
    return (W.data_ptr(), *W.stride(), DTYPES[W.dtype], *csr)


def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """:func:`.reference.scatter_values_`, touching only the cache lines of ``W`` that hold selected entries."""
    entries = table(_entries(W, row_offsets, columns))
    check(library().fps_scatter_values(entries, values.data_ptr(), DTYPES[values.dtype], torch.get_num_threads()))


def masked_adamw_(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """:func:`.reference.masked_adamw_` for all tensors in one call."""
    PreparedAdamW(tensors).run(tensors.grads, options)


def agree_values_(agreement: Agreement) -> None:
    """:func:`.reference.agree_values_` for all tensors in one call."""
    PreparedAgreement(agreement).run()


class PreparedAgreement(records.PreparedAgreement):
    """A run is one call with three numbers."""

    def __init__(self, agreement: Agreement) -> None:
        self._held = agreement
        rows = [
            (*_entries(W, row_offsets, columns), values.data_ptr(), agreed.data_ptr())
            for W, row_offsets, columns, values, agreed in zip(*agreement, strict=True)
        ]
        self._table = np.array(rows, dtype=np.int64)
        begin, pitch = self._table.ctypes.data, self._table.strides[0]
        self._rows = [begin + i * pitch for i in range(len(rows))]
        self._call = library().fps_agree_values

    def run(self) -> None:
        if status := self._call(self._rows[0], len(self._rows), torch.get_num_threads()):
            check(status)

    def run_one(self, index: int) -> None:
        if status := self._call(self._rows[index], 1, torch.get_num_threads()):
            check(status)


class PreparedAdamW(records.PreparedAdamW):
    """A run writes what has changed into the table, and calls once."""

    def __init__(self, tensors: AdamWTensors) -> None:
        super().__init__(tensors)
        rows = []
        for W, grad, row_offsets, columns, master, *state in zip(*tensors, strict=True):
            compact = grad.dim() == 1
            gradient = grad.data_ptr(), *((0, 0) if compact else grad.stride()), DTYPES[grad.dtype], int(compact)
            held = master.data_ptr() if master.numel() else 0
            *moments, agreed = state
            noted = agreed.data_ptr() if agreed.numel() else 0
            rows.append((*_entries(W, row_offsets, columns), *gradient, held, *(s.data_ptr() for s in moments), noted))
        n = len(rows)
        self._table = np.array(rows, dtype=np.int64)
        self._grads = self._table[:, _GRAD]
        self._lrs, self._weight_decays = np.empty(n), np.empty(n)
        self._lrs_address = self._lrs.ctypes.data
        self._last: tuple[Sequence[float], Sequence[float]] = ((), ())
        self._how = AdamW(weight_decays=self._weight_decays.ctypes.data)
        self._arguments = self._table.ctypes.data, n, ctypes.addressof(self._how)
        self._call = library().fps_masked_adamw

    def run(self, grads: Gradients, options: AdamWOptions) -> None:
        lrs, weight_decays, beta1, beta2, eps, maximize, grad_scale, found_inf, zero_grads = options
        if (moved := self._moved(grads)) is not None:
            self._grads[:] = self._addresses = moved
        last_lrs, last_decays = self._last
        how = self._how
        if isinstance(lrs, Tensor):
            how.lrs = lrs.data_ptr()
        else:
            if lrs != last_lrs:
                self._lrs[:] = last_lrs = list(lrs)
            how.lrs = self._lrs_address
        if weight_decays != last_decays:
            self._weight_decays[:] = last_decays = list(weight_decays)
        self._last = last_lrs, last_decays
        how.beta1, how.beta2, how.eps = beta1, beta2, eps
        how.maximize, how.zero_grads = maximize, zero_grads
        how.grad_scale = None if grad_scale is None else grad_scale.data_ptr()
        how.found_inf = None if found_inf is None else found_inf.data_ptr()
        if status := self._call(*self._arguments, torch.get_num_threads()):
            check(status)
