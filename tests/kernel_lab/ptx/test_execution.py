"""Every op's kernels, executed from the PTX that Triton makes for sm_90, twice: by Triton's launcher and by ours."""

import pytest

from kernel_lab.ptx.cases import OPS, SHORT, Case, cases
from kernel_lab.ptx.checking import check, run

LANE = {str(case): case for case in cases() if case.lane}
# Ops that repeat their launches with addresses alone.
REPEATING = ("sampled_grad", "sampled_grad_with_bias", "linear_gradients", "sampled_grad_conv2d", "prepared_adamw")


def test_the_lane_has_every_op_and_dtype():
    covered = {(case.op, SHORT[case.dtype]) for case in LANE.values()}
    assert covered == {(op, dtype) for op in OPS for dtype in SHORT.values()}
    assert len({str(case) for case in cases()}) == len(list(cases())), "two cases have one name"


@pytest.mark.parametrize("name", list(LANE))
def test_executes(name: str) -> None:
    """No fault, the reference's numbers, and the same bits when the launches are repeated."""
    checked = check(LANE[name], "sm_90", all_orders=False)
    assert not checked.problems, "\n".join(checked.problems)
    assert checked.launched


@pytest.mark.parametrize("op", REPEATING)
def test_the_second_time_launches_are_repeated(op: str) -> None:
    """With addresses in place of tensors: it is our launcher that is executed then, and no other."""
    case: Case = next(case for case in LANE.values() if case.op == op)
    outcome = run(case, "sm_90", twice=True)
    first, second = outcome.gpu.repeated[: len(outcome.launched)], outcome.gpu.repeated[len(outcome.launched) :]
    assert first
    assert not any(first)
    assert second
    assert all(second)
    assert outcome.repeated is None
