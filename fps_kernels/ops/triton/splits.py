"""Stage 2 of the sampled gradients: sums of parts of the rows, added in a fixed order, without float atomics."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fps_kernels.ops.triton.launching import Compiled, Grid, launch
from fps_kernels.ops.triton.target import AS_WRITTEN

ADDED_ENTRIES = 64


class Plan(NamedTuple):
    """A launch that writes sums of parts of the rows, and one that adds them if there are several."""

    results: int
    splits: int
    compiled: Compiled
    grid: Grid
    numbers: tuple[int, ...]
    adding: Compiled | None

    def run(self, device: torch.device, *addresses: int) -> Tensor:
        """The results, float32 ``[results]``, of tensors at these addresses."""
        sums = torch.empty(self.results, dtype=torch.float32, device=device)
        if self.adding is None:
            self.compiled.launch(self.grid, *addresses, sums.data_ptr(), *self.numbers)
            return sums
        partials = torch.empty(self.splits * self.results, dtype=torch.float32, device=device)
        self.compiled.launch(self.grid, *addresses, partials.data_ptr(), *self.numbers)
        grid = (-(-self.results // ADDED_ENTRIES), 1, 1)
        self.adding.launch(grid, partials.data_ptr(), sums.data_ptr(), self.results, self.splits)
        return sums


def finish(
    compiled: Compiled | None, grid: Grid, numbers: tuple[int, ...], partials: Tensor, sums: Tensor, add: bool = False
) -> Plan | None:
    """Stage 2 of a launch of stage 1, unless that wrote into ``sums``; and both as what can be repeated."""
    if partials is sums:
        return None if compiled is None else Plan(len(sums), 1, compiled, grid, numbers, None)
    adding = launch_add_splits(partials, sums, add)
    if compiled is None or adding is None:
        return None
    return Plan(len(sums), len(partials), compiled, grid, numbers, adding)


def launch_add_splits(partials: Tensor, sums: Tensor, add: bool = False) -> Compiled | None:
    """Stage 2: the partial sums ``[splits, results]`` into ``sums``, added to what is there if ``add``."""
    splits, results = partials.shape
    return launch(
        _add_splits,
        (triton.cdiv(results, ADDED_ENTRIES),),
        partials,
        sums,
        results,
        splits,
        ADD=add,
        BLOCK_S=16,
        BLOCK_E=ADDED_ENTRIES,
        num_warps=4,
        **AS_WRITTEN,
    )


@triton.jit(do_not_specialize=["nnz", "splits"])
def _add_splits(
    partials_ptr,
    grad_ptr,
    nnz,
    splits,
    ADD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Stage 2 of ``reference.sampled_grad``: ``grad[e] = sum_s partials[s, e]`` in float64, and one rounding.

    Must move: the partials once.
    """
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BE]
    inside = entries < nnz
    if ADD:
        total = tl.load(grad_ptr + entries, mask=inside, other=0.0).to(tl.float64)
    else:
        total = tl.zeros([BLOCK_E], tl.float64)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S).to(tl.int64)  # [BS]
        part = tl.load(
            partials_ptr + split[:, None] * nnz + entries[None, :],
            mask=(split < splits)[:, None] & inside[None, :],
            other=0.0,
        )  # [BS, BE]
        total += tl.sum(part.to(tl.float64), 0)
    tl.store(grad_ptr + entries, total.to(tl.float32), mask=inside)
