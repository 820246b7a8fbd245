"""Executes a case and compares what it gives: with the reference, with itself when repeated, and in other orders."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kernel_lab.ptx.cases import OPS, Case, tensors_of
from kernel_lab.ptx.launches import Edit, ExecutedGpu, Order, executing
from kernel_lab.ptx.machine import Launched
from kernel_lab.ptx.operands import Array
from kernel_lab.ptx.watching import register_exactly

SEED = 1


@dataclass(frozen=True)
class Schedule:
    """In which order the programs of a launch run, and how many in lockstep."""

    name: str
    order: Order | None = None
    at_once: int | None = None


def _backwards(programs: int) -> Array:
    return np.arange(programs)[::-1]


def _shuffled(programs: int) -> Array:
    return np.random.default_rng(0).permutation(programs)


FIRST_TO_LAST = Schedule("first to last")
OTHER_SCHEDULES = (Schedule("last to first, one by one", _backwards, 1), Schedule("shuffled", _shuffled, 5))


@dataclass(frozen=True)
class Outcome:
    """What a case did in one order.

    Attributes:
        gpu: with its findings.
        launched: what its launches did, the first time.
        tensors: its arguments and results afterwards; of the first time, if it was called twice.
        repeated: what is different the second time, made by repeated launches where the op has them; ``None`` if nothing.
        arguments: as they were built, now with what the op wrote.
    """

    gpu: ExecutedGpu
    launched: list[Launched]
    tensors: list[Tensor]
    repeated: str | None
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Checked:
    """A case on one GPU.

    Attributes:
        error: the largest deviation from the reference, relative to the largest number of its tensor.
        problems: what is wrong, in words; empty if nothing is.
        notes: what may be harmless.
    """

    case: Case
    target: str
    launched: list[Launched]
    error: float
    problems: list[str]
    notes: list[str]
    least_bytes: int
    elements: int


def run(
    case: Case, target: str, schedule: Schedule = FIRST_TO_LAST, edit: Edit | None = None, twice: bool = False
) -> Outcome:
    """Executes a case.

    Args:
        target: ``"sm_80"`` or ``"sm_90"``.
        edit: changes the PTX of a kernel, of its name and its text.
        twice: call the op again on the same arguments: repeated launches must give the same bits.
    """
    torch.manual_seed(SEED)
    arguments = case.build()
    gpu = ExecutedGpu(edit, schedule.order, schedule.at_once)
    given = list(tensors_of(arguments))
    allocations = [
        register_exactly(gpu.memory, tensor, f"argument {i} {list(tensor.shape)}") for i, tensor in enumerate(given)
    ]
    before = [allocation.bytes.copy() for allocation in allocations]
    repeated = None
    with _forced(case.forced), executing(gpu, target):
        perform = OPS[case.op].prepare(*arguments)
        tensors = [*given, *tensors_of(perform())]
        launched = list(gpu.launched)
        if twice:
            first = [tensor.clone() for tensor in tensors]
            for allocation, held in zip(allocations, before, strict=True):
                allocation.bytes[:] = held
            repeated = _difference_in_bits(first, [*given, *tensors_of(perform())])
    return Outcome(gpu, launched, tensors, repeated, arguments)


def check(case: Case, target: str, all_orders: bool = True) -> Checked:
    """Executes a case twice, and in other orders of its programs."""
    try:
        outcome = run(case, target, twice=True)
    except NotImplementedError as missing:
        return Checked(case, target, [], float("nan"), [f"NOT COVERED by the machine: {missing}"], [], 0, 0)
    tensors = [tensor.clone() for tensor in outcome.tensors]
    error = deviation(tensors, expected(case))
    problems = outcome.gpu.findings.problems()
    if not error <= case.tolerance:
        problems.append(f"DIFFERS from the reference by {error:.3g}")
    if outcome.repeated is not None:
        problems.append(f"a repeated launch gives other bits: {outcome.repeated}")
    for schedule in OTHER_SCHEDULES if all_orders and not case.large else ():
        other = run(case, target, schedule)
        different = _difference_in_bits(tensors, other.tensors)
        if different is not None:
            problems.append(f"depends on the order of programs ({schedule.name}): {different}")
        problems += [f"{schedule.name}: {line}" for line in other.gpu.findings.problems() if line not in problems]
    arguments = outcome.arguments
    return Checked(
        case,
        target,
        outcome.launched,
        error,
        problems,
        outcome.gpu.findings.notes(),
        case.least(arguments) + _between_launches(outcome),
        case.elements(arguments),
    )


def _between_launches(outcome: Outcome) -> int:
    """Bytes that one launch of an op leaves for another, out and in again, such as partial sums."""
    known = {tensor.untyped_storage().data_ptr() for tensor in outcome.tensors}
    moved = [(base, *bytes_) for launch in outcome.launched for base, bytes_ in launch.moved.items() if base not in known]
    written = {base for base, _, out in moved if out}
    return sum(in_ + out for base, in_, out in moved if base in written)


def expected(case: Case) -> list[Tensor]:
    """Arguments and results of the reference."""
    torch.manual_seed(SEED)
    arguments = case.build()
    return [*tensors_of(arguments), *tensors_of(OPS[case.op].reference(*arguments))]


def deviation(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, relative to the largest number of each tensor; infinite where NaN or infinity disagree, or shapes."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf")
        got, want = one.double(), other.double()
        same = (got == want) | (got.isnan() & want.isnan())
        if not (got.isfinite() & want.isfinite() | same).all():
            return float("inf")
        if not same.all():
            scale = want[want.isfinite()].abs().max()
            worst = max(worst, float((got - want).abs()[~same].max() / scale))
    return worst


def _difference_in_bits(found: list[Tensor], wanted: list[Tensor]) -> str | None:
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        different = one.contiguous().view(integers) != other.contiguous().view(integers)
        if different.any():
            return f"{int(different.sum())} of {one.numel()} numbers of tensor {i} {list(one.shape)}"
    return None


@contextmanager
def _forced(values: Mapping[str, object]) -> Iterator[None]:
    """Constants of the Triton backend with other values, by ``"module.NAME"``."""
    with ExitStack() as stack:
        for name, value in values.items():
            module, attribute = name.split(".")
            stack.enter_context(patch.object(sys.modules[f"fps_kernels.ops.triton.{module}"], attribute, value))
        yield
