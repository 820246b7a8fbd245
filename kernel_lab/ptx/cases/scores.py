"""``score_topk``, ``score_kth`` and ``score_select``: choices, so that every result is exact."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fps_kernels.ops import reference
from kernel_lab.ptx.cases.case import BF16, DTYPES, FP32, INFINITY, Arguments, Case, matrix, randn, size

FILLS = ("random", "tied", "nan")
PASSES = 3  # that score_kth makes over the weights


def cases() -> Iterator[Case]:
    yield from _topks()
    yield from _thresholds()
    yield from _counts()
    yield from _selects()


def filled(rows: int, columns: int, dtype: torch.dtype, layout: str, fill: str, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A weight ``[rows, columns]`` and its factors ``[groups, columns]``; with many ties, or with NaN and infinity."""
    W, a = matrix(rows, columns, dtype, layout), torch.rand(groups, columns)
    if fill == "tied":
        return (W * 2).round(), torch.ones_like(a)
    if fill == "nan":
        W[:, ::7], W[:, 1::5] = float("nan"), INFINITY
    return W, a


def _elements(arguments: Arguments) -> int:
    weights = arguments[0]
    return sum(W.numel() for W in weights) if isinstance(weights, list) else int(weights.numel())


def _topks() -> Iterator[Case]:
    def build(rows: int, columns: int, dtype: torch.dtype, layout: str, fill: str, groups: int, k: int) -> Arguments:
        return *filled(rows, columns, dtype, layout, fill, groups), k

    def least(arguments: Arguments) -> int:
        W, a, k = arguments
        return size(W, a) + int(W.shape[0] * k * 4)

    case = partial(Case, "score_topk", least=least, elements=_elements)
    shapes = (
        (1, 1, "rows", 1),
        (9, 5, "rows", 3),
        (13, 100, "strided", 1),
        (10, 256, "rows", 2),
        (6, 771, "rows", 1),
        (40, 96, "transposed", 1),
        (4, 768, "padded", 1),
        (3, 1500, "offset", 1),
    )
    for number, dtype in enumerate(DTYPES):
        for place, (rows, columns, layout, groups) in enumerate(shapes):
            for which, fill in enumerate(FILLS):
                ks = sorted({1, min(3, columns), min(20, columns), columns if columns < 300 else 64})
                for j, k in enumerate(ks):
                    name = f"[{rows}, {columns}] {layout} {fill} groups {groups} k={k}"
                    made = partial(build, rows, columns, dtype, layout, fill, groups, k)
                    lane = place > 0 and which == (place + j) % 3 and number == (place + j) % 3
                    yield case(name, dtype, made, lane=lane)
        for which, fill in enumerate(FILLS):
            for k in (2, 1000):
                made = partial(build, 2, 9001, dtype, "rows", fill, 1, k)
                yield case(f"[2, 9001] {fill} k={k}", dtype, made, lane=which == number and k == 1000)
        for k in (1, 8, 64):
            made = partial(build, 64, 768, dtype, "rows", "random", 1, k)
            yield case(f"[64, 768] k={k}", dtype, made, large=True)
    large = ((32, 3072, BF16, "rows"), (256, 768, FP32, "transposed"), (8, 9216, BF16, "rows"))
    for rows, columns, dtype, layout in large:
        for k in (1, 64):
            made = partial(build, rows, columns, dtype, layout, "random", 1, k)
            yield case(f"[{rows}, {columns}] {layout} k={k}", dtype, made, large=True)


def _thresholds() -> Iterator[Case]:
    shapes = (
        (33, 70, "rows"),
        (64, 256, "rows"),
        (9, 49, "strided"),
        (40, 64, "padded"),
        (20, 30, "transposed"),
        (1, 1, "rows"),
        (5, 300, "offset"),
    )

    def lists(pairs: list[tuple[Tensor, Tensor]], k: int) -> Arguments:
        return [W for W, _ in pairs], [a for _, a in pairs], k

    def seven(dtype: torch.dtype, fill: str) -> Arguments:
        return lists([filled(rows, columns, dtype, layout, fill) for rows, columns, layout in shapes], 700)

    def mixed() -> Arguments:
        return lists([filled(12, 48, dtype, "rows", "random", 3) for dtype in DTYPES], 1)

    def alone(rows: int, columns: int, dtype: torch.dtype) -> Arguments:
        return lists([filled(rows, columns, dtype, "rows", "random")], rows * columns // 20)

    def block(dtype: torch.dtype) -> Arguments:
        weights = [randn(O // 8, C, dtype=dtype) * 0.02 for O, C in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]
        return weights, [torch.rand(1, W.shape[1]) for W in weights], sum(W.numel() for W in weights) // 100

    def least(arguments: Arguments) -> int:
        weights, factors, _ = arguments
        return PASSES * size(*weights, *factors)

    case = partial(Case, "score_kth", least=least, elements=_elements)
    many = {"entry_tables.LEAST_ENTRIES": 500, "entry_tables.MOST_ENTRIES": 500}
    for number, dtype in enumerate(DTYPES):
        for which, fill in enumerate(FILLS):
            made = partial(seven, dtype, fill)
            yield case(f"seven tensors, {fill}", dtype, made, lane=number == which)
            yield case(f"seven tensors, {fill}, many programs", dtype, made, forced=many, lane=(number + 1) % 3 == which)
    yield case("three dtypes, groups 3, k=1", FP32, mixed, lane=True)
    for dtype in (FP32, BF16):
        for rows, columns in ((64, 256), (43, 768), (40, 64), (43, 70)):
            yield case(f"[{rows}, {columns}] alone", dtype, partial(alone, rows, columns, dtype), lane=columns == 70)
        yield case("an eighth of a ViT-B block, 1 %", dtype, partial(block, dtype), large=True)


def _counts() -> Iterator[Case]:
    def build(dtype: torch.dtype, fill: str) -> Arguments:
        shapes = (
            (9, 5, "rows", 3),
            (70, 100, "strided", 1),
            (33, 256, "rows", 1),
            (40, 96, "transposed", 2),
            (0, 8, "rows", 1),
        )
        made = [filled(rows, columns, dtype, layout, fill, groups) for rows, columns, layout, groups in shapes]
        thresholds = [reference.score_kth([W], [a], W.numel() // 20)[0] if W.numel() else torch.tensor(1.0) for W, a in made]
        return [W for W, _ in made], [a for _, a in made], torch.stack(thresholds)

    def least(arguments: Arguments) -> int:
        return size(*arguments[0], *arguments[1])

    case = partial(Case, "score_counts", least=least, elements=_elements)
    many = {"entry_tables.LEAST_ENTRIES": 500, "entry_tables.MOST_ENTRIES": 500}
    for number, dtype in enumerate(DTYPES):
        for which, fill in enumerate(FILLS):
            made = partial(build, dtype, fill)
            yield case(f"five tensors, {fill}", dtype, made, lane=number == which)
            yield case(f"five tensors, {fill}, many programs", dtype, made, forced=many)


def _selects() -> Iterator[Case]:
    def build(rows: int, columns: int, dtype: torch.dtype, layout: str, fill: str, groups: int, k: int) -> Arguments:
        W, a = filled(rows, columns, dtype, layout, fill, groups)
        threshold, _, _ = reference.score_kth([W], [a], k)
        return W, a, threshold, k

    def least(arguments: Arguments) -> int:
        W, a, _, nnz = arguments
        return 2 * size(W, a) + 4 * int(W.shape[0] + nnz)

    case = partial(Case, "score_select", least=least, elements=_elements)
    shapes = (
        (1, 1, "rows", 1),
        (9, 5, "rows", 3),
        (70, 100, "strided", 1),
        (33, 256, "rows", 1),
        (5, 771, "rows", 1),
        (40, 96, "transposed", 1),
        (20, 600, "padded", 2),
    )
    for number, dtype in enumerate(DTYPES):
        for place, (rows, columns, layout, groups) in enumerate(shapes):
            for which, fill in enumerate(FILLS):
                made = partial(build, rows, columns, dtype, layout, fill, groups, max(1, rows * columns // 20))
                lane = place > 0 and (place + number) % 3 == which and (place + number) % 2 == 0
                yield case(f"[{rows}, {columns}] {layout} {fill} groups {groups}", dtype, made, lane=lane)
    made = partial(build, 2500, 8, FP32, "rows", "tied", 1, 2000)
    yield case("[2500, 8] tied: several blocks of rows", FP32, made, lane=True)
    for dtype in (FP32, BF16):
        made = partial(build, 256, 768, dtype, "rows", "random", 1, 256 * 768 // 100)
        yield case("[256, 768] 1 %", dtype, made, large=True)
