"""``sparse_delta_matmul_``: a sparse change beside a linear map, and the gradient of its input."""

from collections.abc import Iterator
from functools import partial

import torch

from fps_kernels.ops.reference import entry_rows
from kernel_lab.ptx.cases.case import BF16, DTYPES, FP32, INT32, SUM_BOUND, Arguments, Case, csr, matrix, randn, size

BOUNDS = {FP32: SUM_BOUND, BF16: 2**-7, torch.float16: 2**-10}  # the last two: one rounding of the result


def cases() -> Iterator[Case]:
    shapes = (
        (1, 1, 1, 1, "rows"),
        (7, 5, 3, 6, "rows"),
        (70, 64, 48, 150, "rows"),
        (130, 33, 70, 200, "padded"),
        (90, 50, 60, 200, "strided"),
        (65, 48, 80, 200, "transposed"),
    )
    for number, dtype in enumerate(DTYPES):
        case = partial(Case, "sparse_delta_matmul_", dtype=dtype, least=_least, elements=_elements, tolerance=BOUNDS[dtype])
        for place, (rows, O, C, entries, layout) in enumerate(shapes):
            for ordered in (False, True):
                name = f"[{rows}, {O}] += [{rows}, {C}] {layout}, {entries} entries" + ", in another order" * ordered
                made = partial(_build, rows, O, C, entries, dtype, layout, ordered)
                yield case(name, build=made, lane=place > 0 and (place + number + ordered) % 3 == 0)
        made = partial(_build, 256, 768, 768, 3072, dtype, "rows", False)
        yield case("[256, 768] += [256, 768], 4 entries an output", build=made, large=True)


def _build(rows: int, O: int, C: int, entries: int, dtype: torch.dtype, layout: str, ordered: bool) -> Arguments:
    offsets, columns = csr(O, C, entries, per_row=entries == 4 * O)
    order = None
    if ordered:
        order = columns.long().argsort(stable=True).to(INT32)
        lengths = torch.bincount(columns.long(), minlength=C)
        columns = entry_rows(offsets)[order.long()].to(INT32)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(INT32)
        O, C = C, O
    y = matrix(rows, O, dtype, "rows" if layout == "padded" else layout)
    return y, matrix(rows, C, dtype, layout), offsets, columns, randn(columns.numel()), order


def _least(arguments: Arguments) -> int:
    y, _, offsets, columns, values, _ = arguments
    written = int((offsets.diff() > 0).sum())
    read = int(columns.unique().numel())
    return int(y.shape[0] * y.element_size() * (2 * written + read)) + size(offsets, columns, values)


def _elements(arguments: Arguments) -> int:
    """Multiplications."""
    return int(arguments[0].shape[0] * arguments[3].numel())
