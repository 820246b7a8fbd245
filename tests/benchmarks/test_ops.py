"""The timed calls of ops are right, and none is missing."""

import pytest

from benchmarks import test_ops as benchmark
from fps_kernels.ops._dispatch import OPS


def test_every_op_is_timed():
    assert {name.partition("-")[0] for name in benchmark.CASES} == set(OPS)


@pytest.mark.parametrize("name", benchmark.CASES)
def test_results_are_those_of_torch(name):
    case = benchmark.CASES[name]()
    case.check(case.op(), case.plain())
    assert case.nbytes > 0


def test_a_wrong_result_is_not_timed():
    case = benchmark.CASES["score_topk"]()
    with pytest.raises(AssertionError):
        case.check([columns + 1 for columns in case.op()], case.plain())
