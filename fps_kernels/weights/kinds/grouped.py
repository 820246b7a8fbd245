"""Experts of a mixture, ``F.grouped_mm``: rows of the input are sorted by expert, and each expert multiplies its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.weights.kinds.contraction import blockwise_gradient
from fps_kernels.weights.kinds.kind import Call, WeightKind

NAME = "F.grouped_mm"
SCORED = True
DIMENSIONS = (3,)


@dataclass(frozen=True, eq=False)
class Grouped(WeightKind):
    """Rows ``ends[e - 1]:ends[e]`` of the input ``[T, C]`` are multiplied by ``W[e]``, ``[C, O]``.

    Attributes:
        ends: int32 ``[E]``, where they are.
        stops: the same numbers, for the host. What a model computes with experts of its own choice waits for them anyway.
    """

    ends: Tensor
    stops: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.stops)

    def _parts(self, t: Tensor) -> Iterator[Tensor]:
        begin = 0
        for stop in self.stops:
            yield t[begin:stop]
            begin = stop

    def input_rows(self, x: Tensor) -> tuple[int, ...]:
        return tuple(part.shape[0] for part in self._parts(x))

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        for part, own in zip(self._parts(x), norm, strict=True):
            ops.column_norm_(part, own, ord)

    def channel_dim(self, x: Tensor) -> int | None:
        return 1

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        pairs = zip(self._parts(gy), self._parts(x), strict=True)
        return blockwise_gradient(pairs, self.groups, row_offsets, columns)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight, offs=self.ends)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        gx: Tensor = F.grouped_mm(gy, weight.to(gy.dtype).transpose(-2, -1), offs=self.ends)
        if self.stops[-1] < shape[0]:  # rows of no expert
            gx = torch.cat([gx[: self.stops[-1]], gx.new_zeros(shape[0] - self.stops[-1], shape[1])])
        return gx


def read(input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Call | None:
    """``None`` where it is no product of sorted rows with a stack of matrices, or has another dtype than these."""
    if not isinstance(mat2, Tensor) or input.dim() != 2 or mat2.dim() != 3 or offs is None or bias is not None:
        return None
    if out_dtype not in (None, input.dtype):
        return None
    return Call(mat2, input, (), Grouped(offs, tuple(offs.tolist())), (0, 2))


# F.grouped_mm calls the first one.
FUNCTIONS = dict.fromkeys((torch._grouped_mm, torch.ops.aten._grouped_mm.default), read)
