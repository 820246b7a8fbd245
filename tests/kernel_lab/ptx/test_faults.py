"""Faults that are planted in sound kernels: the machine sees them, each by the check that is there for it."""

from functools import cache

import pytest

from kernel_lab.ptx.cases import cases
from kernel_lab.ptx.faults import FAULTS, Fault, Trial, Verdict

CASES = (
    "column_norm_ fp32 [257, 512] rows ord 1",
    "score_topk fp32 [3, 1500] offset random groups 1 k=3",
    "score_select fp32 [33, 256] rows tied groups 1",
    "sampled_grad bf16 gather [130, 130] x [130, 70] rows, 400 entries",
    "sampled_grad bf16 product [130, 130] x [130, 70] rows, 400 entries",
    "sampled_grad bf16 product [100, 96] x [100, 200] padded, 300 entries",
    "sampled_grad fp32 product [100, 96] x [100, 200] padded, 300 entries",
    "sampled_grad_conv2d fp16 [3, 6, 9, 11] to 9, 3x5, 60 entries",
    "masked_adamw_ fp32 five tensors, zeroed",
    "score_kth fp32 [43, 70] alone",
    "pack_groups fp32 [5001] in 4 bits, nearest",
    "pack_groups bf16 [3, 5, 6, 7] of [4, 6, 8, 9] in 8 bits, seed 3",
    "unpack_groups bf16 [5001] of 8 bits",
)
PLACES = 2  # of each fault in each case
# What each kind must be seen by: a check that is taken out of the machine is missed here.
SEEN_BY = {
    "a barrier removed": {
        "shared-memory race (read)",
        "shared-memory race (write)",
        "read by one program, written by another",
    },
    "the guard of a global load removed": {"global load out of bounds"},
    "the guard of a global store removed": {"global store out of bounds"},
    "the guard of an atomic removed": {"wrong result"},
    "an exchange of lanes that exchanges nothing": {"wrong result", "lanes of one shared store write different values"},
    "a shared store 4 bytes off": {"load of uninitialised shared memory", "wrong result"},
    "a global store 4 bytes off": {"wrong result", "global bytes written by two programs, different values"},
    "copies waited for too little": {"shared memory used while a copy into it is in flight"},
    "matrix products not waited for": {"register of a wgmma in flight", "write to an operand of a wgmma in flight"},
}
# Where some places of a fault cannot change anything that anybody would notice, although threads do something else.
HARMLESS = {
    ("a barrier removed", "_add_splits"): "the loop that it begins is run through once",
    ("the guard of a global load removed", "_histogram"): "what is read instead is a neighbour, and is masked again",
    ("an exchange of lanes that exchanges nothing", "_choose_digit"): "one is of the upper halves of int64 counts: zeros",
    ("an exchange of lanes that exchanges nothing", "_product"): "of a block's many entries other lanes have some, too",
    ("the guard of a global store removed", "_choose_digit"): "all threads hold the number that one of them stores",
    ("the guard of a global store removed", "_counts"): "all threads hold the number that one of them stores",
    ("the guard of a global store removed", "_count_rows"): "all lanes of a row hold the number that one of them stores",
    ("the guard of an atomic removed", "_histogram"): "what the guard keeps away adds zero",
    ("a shared store 4 bytes off", "_gather_windows"): "in Triton 3.6's, sums of 1e-5 go to the next entry",
    ("a shared store 4 bytes off", "_product"): "what an earlier maximum left there is as large",
    ("matrix products not waited for", "_product"): "the next product goes on with the same results and is waited for",
}


@cache
def trial(name: str) -> Trial:
    return Trial(next(case for case in cases() if str(case) == name))


@cache
def verdicts(name: str, fault: Fault) -> list[Verdict]:
    tried = (trial(name).plant(fault, number) for number in range(PLACES))
    return [verdict for verdict in tried if verdict is not None]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", CASES)
def test_a_planted_fault_is_seen(name: str, fault: Fault) -> None:
    for verdict in verdicts(name, fault):
        assert verdict.seen or verdict.excuse or (fault.name, verdict.kernel) in HARMLESS, str(verdict)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_kind_is_seen_by_the_check_that_is_there_for_it(fault: Fault) -> None:
    found = [verdict for name in CASES for verdict in verdicts(name, fault) if verdict.seen]
    kinds = {kind for verdict in found for kind in verdict.seen}
    missing = {wanted for wanted in SEEN_BY[fault.name] if not any(wanted in kind for kind in kinds)}
    assert not missing, kinds
    assert len({name for name in CASES if any(v.seen for v in verdicts(name, fault))}) >= (
        1 if "atomic" in fault.name else 2
    )


def test_a_sound_kernel_has_no_fault() -> None:
    """Otherwise a fault that was there before would be taken for the planted one."""
    for name in CASES:
        assert not trial(name).problems, name
