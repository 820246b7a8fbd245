"""``masked_adamw_``, ``agree_values_``, their prepared forms, and ``scatter_values_``."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fps_kernels.ops import reference
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement
from kernel_lab.ptx.cases.case import (
    DTYPES,
    FP32,
    FP64,
    SECTOR,
    SHORT,
    Arguments,
    Case,
    at_entries,
    csr,
    matrix,
    randn,
    size,
)

SHAPES = ((9, 7, 20), (70, 30, 600), (1, 1, 1), (40, 100, 1500), (300, 4, 700))  # rows, columns, entries
NETWORK = ((768, 768, 5898), (384, 3072, 11796))
SPECIAL = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45, -1e-40, 1e38, 65520.0, 1 + 2.0**-8])


def cases() -> Iterator[Case]:
    yield from _steps()
    yield from _agreements()
    yield from _scatters()


class Kind(NamedTuple):
    """What is special about a step."""

    compact: bool = False
    scaler: bool = False
    zero: bool = False
    skipped: bool = False
    maximize: bool = False
    layout: str = "rows"
    grad_dtype: torch.dtype | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    agreed: bool = False  # values are noted, and both sides changed a little
    plain_rates: bool = False


KINDS = {
    "dense": Kind(),
    "compact": Kind(compact=True),
    "scaler": Kind(scaler=True),
    "zeroed": Kind(zero=True, scaler=True),
    "skipped, zeroed": Kind(zero=True, scaler=True, skipped=True),
    "maximize": Kind(maximize=True),
    "transposed": Kind(layout="transposed"),
    "strided, zeroed": Kind(layout="strided", zero=True),
    "fp32 gradients": Kind(grad_dtype=FP32, layout="offset"),
    "beta1 0.2": Kind(betas=(0.2, 0.9), compact=True, zero=True),
}
PREPARED_KINDS = {
    "dense, plain rates": Kind(plain_rates=True),
    "compact, agreed": Kind(compact=True, agreed=True),
    "strided, scaler, zeroed": Kind(layout="strided", scaler=True, zero=True, plain_rates=True),
    "skipped, zeroed": Kind(zero=True, scaler=True, skipped=True),
}


def prepared_adamw(tensors: AdamWTensors, options: AdamWOptions) -> Callable[[], None]:
    """A prepared step whose gradients have moved since it was prepared."""
    examples = [torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype) for grad in tensors.grads]
    prepared = backend.PreparedAdamW(tensors._replace(grads=examples))
    return lambda: prepared.run(tensors.grads, options)


def reference_prepared_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    reference.PreparedAdamW(tensors).run(tensors.grads, options)


def prepared_agreement(*tensors: list[Tensor]) -> Callable[[], None]:
    """All weights at once, then each alone, when there is nothing left to do."""
    prepared = backend.PreparedAgreement(Agreement(*tensors))

    def run() -> None:
        prepared.run()
        for index in range(len(tensors[0])):
            prepared.run_one(index)

    return run


def _step(shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, kind: Kind) -> Arguments:
    weights = [matrix(O, C, dtype, kind.layout) for O, C, _ in shapes]
    selections = [csr(O, C, entries) for O, C, entries in shapes]
    grads, masters, agreed = [], [], []
    for W, selection in zip(weights, selections, strict=True):
        grad_dtype, nnz = kind.grad_dtype or dtype, selection[1].numel()
        grads.append(
            randn(nnz, dtype=grad_dtype) if kind.compact else matrix(W.shape[0], W.shape[1], grad_dtype, kind.layout)
        )
        values = at_entries(W, *selection).float()
        masters.append(torch.empty(0) if dtype == FP32 and not kind.agreed else values)
        agreed.append(values.clone() if kind.agreed else torch.empty(0))
        if kind.agreed:  # on one side or the other, and on both
            values[::5] += 1
            W[::3] *= 2
    lengths = [columns.numel() for _, columns in selections]
    tensors = AdamWTensors(
        weights,
        grads,
        [row_offsets for row_offsets, _ in selections],
        [columns for _, columns in selections],
        masters,
        [randn(nnz) * 0.1 for nnz in lengths],
        [torch.rand(nnz) * 0.1 for nnz in lengths],
        [torch.tensor(3.0) for _ in shapes],
        agreed,
    )
    rates = [0.01 * (i + 1) for i in range(len(shapes))]
    scale, found = (torch.tensor(4.0), torch.tensor(float(kind.skipped))) if kind.scaler else (None, None)
    lrs = rates if kind.plain_rates else torch.tensor(rates, dtype=FP64)
    decays = [0.01] * len(shapes)
    return tensors, AdamWOptions(lrs, decays, *kind.betas, 1e-8, kind.maximize, scale, found, kind.zero)


def _least_of_step(arguments: Arguments) -> int:
    tensors, options = arguments
    nnz = _entries_of_step(arguments)
    W, grad, master, agreed = (tensors[i][0] for i in (0, 1, 4, 8))
    per_entry: int = 4 + 16  # column, moments in and out
    per_entry += 8 + SECTOR if master.numel() else 2 * SECTOR
    per_entry += SECTOR + 8 if agreed.numel() else 0
    per_entry += (W.element_size() if grad.dim() == 1 else SECTOR) * (2 if options.zero_grads else 1)
    return nnz * per_entry


def _entries_of_step(arguments: Arguments) -> int:
    tensors: AdamWTensors = arguments[0]
    return sum(columns.numel() for columns in tensors.columns)


def _steps() -> Iterator[Case]:
    for number, dtype in enumerate(DTYPES):
        tolerance = 4e-7 if dtype == FP32 else 1e-3
        case = partial(
            Case, "masked_adamw_", least=_least_of_step, elements=_entries_of_step, tolerance=tolerance, dtype=dtype
        )
        for place, (name, kind) in enumerate(KINDS.items()):
            made = partial(_step, SHAPES, dtype, kind)
            yield case(name=f"five tensors, {name}", build=made, lane=(place + number) % 3 == 0)
        for name in ("compact", "dense"):
            made = partial(_step, NETWORK, dtype, KINDS[name])
            yield case(name=f"two matrices, 1 %, {name}", build=made, large=True)
        case = partial(
            Case, "prepared_adamw", least=_least_of_step, elements=_entries_of_step, tolerance=tolerance, dtype=dtype
        )
        for place, (name, kind) in enumerate(PREPARED_KINDS.items()):
            made = partial(_step, SHAPES, dtype, kind)
            yield case(name=f"five tensors, {name}", build=made, lane=(place + number) % 2 == 0)


def _agreements() -> Iterator[Case]:
    def build(dtype: torch.dtype, layout: str, shapes: tuple[tuple[int, int, int], ...]) -> Arguments:
        weights = [matrix(O, C, dtype, layout) for O, C, _ in shapes]
        selections = [csr(O, C, entries) for O, C, entries in shapes]
        values = [at_entries(W, *selection).float() for W, selection in zip(weights, selections, strict=True)]
        agreed = [value.clone() for value in values]
        for W, value in zip(weights, values, strict=True):  # some changed on one side, on the other, on both, on neither
            change = torch.rand(value.shape) < 0.3
            value[change] = SPECIAL[torch.randint(len(SPECIAL), (int(change.sum()),))]
            rows = torch.rand(W.shape[0]) < 0.3
            W[rows] = SPECIAL[torch.randint(len(SPECIAL), (int(rows.sum()), W.shape[1]))].to(dtype)
        return weights, [o for o, _ in selections], [c for _, c in selections], values, agreed

    def least(arguments: Arguments) -> int:
        """What changed is written: some of each eight values and of what both agreed on, weights where values changed."""
        values, agreed = arguments[3:]
        changed = sum(int((value != noted).sum()) for value, noted in zip(values, agreed, strict=True))
        return elements(arguments) * (12 + 8 + SECTOR) + changed * SECTOR

    def elements(arguments: Arguments) -> int:
        columns: list[Tensor] = arguments[2]
        return sum(of_one.numel() for of_one in columns)

    for number, dtype in enumerate(DTYPES):
        for op in ("agree_values_", "prepared_agreement"):
            case = partial(Case, op, dtype=dtype, least=least, elements=elements)
            for place, layout in enumerate(("rows", "transposed", "strided")):
                made = partial(build, dtype, layout, SHAPES)
                lane = place == (number if op == "agree_values_" else (number + 1) % 3)
                yield case(name=f"five tensors, {layout}", build=made, lane=lane)
        case = partial(Case, "agree_values_", dtype=dtype, least=least, elements=elements)
        yield case(name="two matrices, 1 %", build=partial(build, dtype, "rows", NETWORK), large=True)


def _scatters() -> Iterator[Case]:
    def build(O: int, C: int, entries: int, dtype: torch.dtype, layout: str, values: torch.dtype) -> Arguments:
        row_offsets, columns = csr(O, C, entries)
        return matrix(O, C, dtype, layout), row_offsets, columns, randn(columns.numel(), dtype=values)

    def least(arguments: Arguments) -> int:
        return int(arguments[2].numel()) * (4 + SECTOR) + size(arguments[3])

    def elements(arguments: Arguments) -> int:
        return int(arguments[2].numel())

    for number, dtype in enumerate(DTYPES):
        case = partial(Case, "scatter_values_", dtype=dtype, least=least, elements=elements)
        for place, layout in enumerate(("rows", "transposed", "strided", "offset")):
            for which, values in enumerate(DTYPES):
                name = f"[60, 40] {layout}, values {SHORT[values]}"
                made = partial(build, 60, 40, 700, dtype, layout, values)
                yield case(name=name, build=made, lane=(place + number) % 3 == which and place % 3 == number)
        yield case(name="[768, 768] 1 %", build=partial(build, 768, 768, 5898, dtype, "rows", FP32), large=True)
