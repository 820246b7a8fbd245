"""Embeddings: rows of a weight ``[O, C]`` looked up by number, by ``F.embedding``. Trained, never chosen from by what they
multiply: a lookup multiplies nothing. A weight that is shared with an output layer is chosen from there."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels.weights.kinds.kind import Call, WeightKind

NAME = "F.embedding"
SCORED = False
DIMENSIONS = (2,)


@dataclass(frozen=True)
class Embedding(WeightKind):
    """Each number of the input ``[...]`` is replaced by that row of the weight.

    Attributes:
        padding: the row that gets no gradient, -1 for none.
    """

    padding: int = -1

    def input_rows(self, x: Tensor) -> int:
        return 0

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        raise TypeError("rows are looked up: no input multiplies them")

    def channel_dim(self, x: Tensor) -> int | None:
        return None

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        if not gy.is_cpu:
            return self._without_waiting(gy, x, row_offsets, columns)
        # One dense row for each different number of the batch, not for each of the vocabulary.
        present, place = x.flatten().unique(return_inverse=True)
        rows = torch.zeros(present.numel(), gy.shape[-1], dtype=torch.float32, device=gy.device)
        rows.index_add_(0, place, gy.reshape(-1, gy.shape[-1]).float())
        rows[present == self.padding] = 0
        lengths = row_offsets.diff()[present].long()
        owner = torch.repeat_interleave(lengths)
        within = torch.arange(owner.numel(), device=gy.device) - (lengths.cumsum(0) - lengths)[owner]
        entries = row_offsets[present].long()[owner] + within
        grad = torch.zeros(columns.numel(), dtype=torch.float32, device=gy.device)
        grad[entries] = rows[owner, columns[entries].long()]
        return grad

    def _without_waiting(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        """:meth:`sampled_gradient` where the host would wait for the number of different rows: in tensors of known sizes.

        One dense row for each number of the batch, of which equal numbers share the one where they first occur.
        """
        numbers, count = x.flatten().long(), x.numel()
        first = torch.full((row_offsets.numel() - 1,), count, dtype=torch.int64, device=gy.device)
        first.scatter_reduce_(0, numbers, torch.arange(count, device=gy.device), "amin")
        if self.padding >= 0:
            first[self.padding].fill_(count)
        rows = torch.zeros(count + 1, gy.shape[-1], dtype=torch.float32, device=gy.device)
        # In a fixed order, unlike index_add_ on a GPU.
        rows.index_put_((first[numbers],), gy.reshape(-1, gy.shape[-1]).float(), accumulate=True)
        rows[count].zero_()  # what padding got, and what everybody reads who does not occur
        every = torch.arange(row_offsets.numel() - 1, device=gy.device)
        owner = torch.repeat_interleave(every, row_offsets.diff().long(), output_size=columns.numel())
        return rows[first[owner], columns.long()]

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, None if self.padding < 0 else self.padding)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        raise TypeError("numbers of rows have no gradient")


def read(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    """``None`` where looking up changes the weight, or gradients are scaled."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return Call(weight, input, (), Embedding(padding))


FUNCTIONS = {F.embedding: read}
