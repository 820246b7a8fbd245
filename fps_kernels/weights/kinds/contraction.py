"""Products of tensors: ``x @ W``, ``W @ x``, ``torch.bmm``, ``torch.einsum``, with a weight of any order of dimensions.

Each is a sum over some dimensions that both operands have, and is read as an equation of ``einsum``. Dimensions of the
weight that the sum runs over count columns; all others count rows: those that only the weight has, and those that it shares
with the input and the output, as the experts of a mixture or heads of an attention, each of which has inputs of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops.transfers import on_host
from fps_kernels.weights.kinds.kind import Call, WeightKind

NAME = "torch.matmul"
SCORED = True
DIMENSIONS = (2, 3, 4)


@dataclass(frozen=True)
class Contraction(WeightKind):
    """``torch.einsum(f"{input},{weight}->{output}", x, W)``.

    Attributes:
        input: a letter for each dimension of the input.
        weight: likewise.
        output: likewise.
        blocks: how many numbers the dimensions count that all three have.
    """

    input: str
    weight: str
    output: str
    blocks: int = 1

    @property
    def groups(self) -> int:
        return self.blocks

    @cached_property
    def _shared(self) -> str:
        return "".join(c for c in self.weight if c in self.input and c in self.output)

    @cached_property
    def _summed(self) -> str:
        return "".join(c for c in self.weight if c in self.input and c not in self.output)

    @cached_property
    def _neurons(self) -> str:
        return "".join(c for c in self.weight if c not in self.input)

    @cached_property
    def _samples(self) -> str:
        return "".join(c for c in self.input if c not in self.weight)

    def _rows(self, t: Tensor, letters: str, last: str) -> Tensor:
        """``[blocks, samples, last]`` of a tensor whose dimensions are called ``letters``."""
        order = [letters.index(c) for c in self._shared + self._samples + last]
        t = t.permute(order)
        shared, samples = len(self._shared), len(self._samples)
        t = t.flatten(shared + samples) if len(last) > 1 else t
        t = t.flatten(shared, shared + samples - 1) if samples > 1 else t.unsqueeze(shared) if samples == 0 else t
        return t.flatten(0, shared - 1) if shared > 1 else t.unsqueeze(0) if shared == 0 else t

    def inputs(self, x: Tensor) -> Tensor:
        """``[blocks, M, C]``."""
        return self._rows(x, self.input, self._summed)

    def outputs(self, y: Tensor) -> Tensor:
        """``[blocks, M, O]`` of the output, or its gradient."""
        return self._rows(y, self.output, self._neurons)

    def input_rows(self, x: Tensor) -> int:
        return self.inputs(x).shape[1]

    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        for rows, own in zip(self.inputs(x), norm, strict=True):
            ops.column_norm_(rows, own, ord)

    def channel_dim(self, x: Tensor) -> int | None:
        # A weight counts channels by the first of its dimensions that are summed over.
        return self.input.index(self._summed[0])

    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        inputs, outputs = self.inputs(x), self.outputs(gy)
        if self.blocks == 1:
            grad: Tensor = ops.sampled_grad(outputs[0], inputs[0], row_offsets, columns)
            return grad
        return blockwise_gradient(zip(outputs, inputs, strict=True), self.blocks, row_offsets, columns)

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        return (self.outputs(gy).float() * self.outputs(y).float()).sum(1).flatten()

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(f"{self.input},{self.weight}->{self.output}", x, weight)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch.einsum(f"{self.output},{self.weight}->{self.input}", gy, weight.to(gy.dtype)).reshape(shape)


def blockwise_gradient(pairs: Iterator[tuple[Tensor, Tensor]], blocks: int, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """Gradients of chosen entries where every block of rows has inputs and outputs of its own.

    Args:
        pairs: gradient of the output ``[M, O / blocks]`` and input ``[M, C]`` of each block.
        blocks: how many.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]``.
    """
    size = (row_offsets.numel() - 1) // blocks
    begins = on_host(row_offsets)[::size].tolist()
    found = []
    for i, (gy, x) in enumerate(pairs):
        own = row_offsets[i * size : (i + 1) * size + 1] - begins[i]
        found.append(ops.sampled_grad(gy, x, own, columns[begins[i] : begins[i + 1]]))
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------ readers


def _call(x: Any, weight: Any, letters: tuple[str, str, str], others: tuple[Any, ...] = ()) -> Call | None:
    """``None`` where an operand has a letter that is in no other, or rows are not in the weight's order."""
    of_input, of_weight, of_output = letters
    if any(len({*part}) != len(part) for part in letters):
        return None
    shared = [c for c in of_weight if c in of_input and c in of_output]
    rows = [c for c in of_weight if c in of_output]
    summed = [c for c in of_weight if c not in of_output]
    if rows[: len(shared)] != shared or not summed or any(c not in of_input for c in summed):
        return None
    if any(c not in of_output for c in of_input if c not in of_weight) or {*of_output} - {*of_input, *of_weight}:
        return None
    if any(x.shape[of_input.index(c)] != weight.shape[of_weight.index(c)] for c in (*shared, *summed)):
        return None  # one of them is expanded
    blocks = 1
    for c in shared:
        blocks *= int(weight.shape[of_weight.index(c)])
    row_dims = tuple(of_weight.index(c) for c in rows)
    return Call(weight, x, others, Contraction(*letters, blocks), row_dims) if rows else None


def _products(a: Any, b: Any, others: tuple[Any, ...] = ()) -> tuple[Call, ...]:
    """``a @ b``, with either of them as the weight."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.dim() or not b.dim():
        return ()
    batch = max(a.dim(), b.dim(), 2) - 2
    letters = ascii_letters[:batch]
    left = letters[batch - max(a.dim() - 2, 0) :] + ("XY"[2 - min(a.dim(), 2) :])
    right = letters[batch - max(b.dim() - 2, 0) :] + "YZ"[: min(b.dim(), 2)]
    result = letters + ("X" if a.dim() > 1 else "") + ("Z" if b.dim() > 1 else "")
    found = (_call(b, a, (right, left, result), others), _call(a, b, (left, right, result), others))
    return tuple(call for call in found if call is not None and call.weight.dim() > 1)


def read(input: Any, other: Any, *, out: Any = None) -> tuple[Call, ...]:
    """``input @ other``."""
    return () if out is not None else _products(input, other)


def read_matrices(input: Any, mat2: Any, *, out: Any = None) -> tuple[Call, ...]:
    """``torch.mm`` and ``torch.bmm``."""
    return () if out is not None else _products(input, mat2)


def read_added(input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> tuple[Call, ...]:
    """``torch.baddbmm``, if neither part is scaled."""
    return _products(batch1, batch2, (input,)) if out is None and alpha == 1 and beta == 1 else ()


def read_equation(equation: Any, *operands: Any, path: Any = None) -> tuple[Call, ...]:
    """``torch.einsum`` of two tensors."""
    if not isinstance(equation, str) or "->" not in equation:
        return ()
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    terms, _, output = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(operands) != 2 or len(parts) != 2 or not all(isinstance(t, Tensor) for t in operands):
        return ()
    free = [c for c in ascii_letters if c not in equation]
    spelled = [_without_dots(part, t.dim(), free) for part, t in zip(parts, operands, strict=True)]
    dots = max((t.dim() - len(part) + 3 for part, t in zip(parts, operands, strict=True) if "..." in part), default=0)
    output = output.replace("...", "".join(free[:dots][::-1]))
    (a, b), (x, y) = operands, spelled
    found = (_call(a, b, (x, y, output)), _call(b, a, (y, x, output)))
    return tuple(call for call in found if call is not None)


def _without_dots(part: str, dims: int, free: list[str]) -> str:
    hidden = dims - len(part) + 3
    return part.replace("...", "".join(free[:hidden][::-1])) if "..." in part else part


def read_reversed(input: Any, other: Any) -> tuple[Call, ...]:
    """``Tensor.__rmatmul__``."""
    return _products(other, input)


FUNCTIONS = {
    Tensor.__rmatmul__: read_reversed,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.ops.aten.matmul.default), read),
    **dict.fromkeys(
        (torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.ops.aten.mm.default, torch.ops.aten.bmm.default), read_matrices
    ),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, torch.ops.aten.baddbmm.default), read_added),
    **dict.fromkeys((torch.einsum, torch.ops.aten.einsum.default), read_equation),
}
