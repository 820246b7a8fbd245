"""How the column factors of scores are read: once for several rows, not once for each of them."""

import triton
import triton.language as tl
from torch import Tensor


def share_factors(W: Tensor, a: Tensor, rows: int) -> bool:
    """Whether any ``rows`` rows of ``W``, counted in blocks from the first, belong to one group of ``a`` ``[G, C]``."""
    return a.shape[0] == 1 or W.shape[0] // a.shape[0] % rows == 0


@triton.jit
def shared_factors(a_ptr, first_row, columns, C, rows_per_group):
    """The factors ``[1, BLOCK_C]`` of rows that share them, of which ``first_row`` is one.

    Read as a vector, each is read by one thread of the program, which hands it to the others through shared memory. Read as
    a tile they would be more bytes than the weights: 4 for each of 2, and in a layout made for those half of each sector.
    """
    return tl.load(a_ptr + (first_row // rows_per_group) * C + columns, mask=columns < C, other=0.0)[None, :]


@triton.jit
def factors_by_row(a_ptr, rows, columns, O, C, rows_per_group):
    """The factors ``[BLOCK_R, BLOCK_C]`` of rows that may belong to several groups."""
    inside = (rows < O)[:, None] & (columns < C)[None, :]
    return tl.load(a_ptr + (rows // rows_per_group)[:, None] * C + columns[None, :], mask=inside, other=0.0)
