"""``agree_values_`` on every backend."""

import pytest
import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference
from tests.support.entries import INT, SPECIAL, AgreementProblem, bits


def same(found: Tensor, expected: list[float]) -> bool:
    """Zeros with their signs; NaN is NaN."""
    wanted = torch.tensor(expected, dtype=found.dtype, device=found.device)
    return bool(((bits(found) == bits(wanted)) | (found.isnan() & wanted.isnan())).all())


@pytest.mark.parametrize("numbers", ["ordinary", "special"])
@pytest.mark.parametrize("who", ["values", "weights", "both", "nobody"])
def test_agrees_again(backend, device, dtype, who, numbers):
    problem = AgreementProblem(device, dtype)
    pool = torch.tensor(SPECIAL, device=device) if numbers == "special" else torch.randn(100, device=device)
    if who in ("values", "both"):
        problem.change(problem.values, pool)
    if who in ("weights", "both"):
        problem.change_weights(pool)
    expected, before = problem.expected(), problem.snapshot()
    others = [W.clone() for W in problem.weights]
    ops.agree_values_(*problem.arguments)
    for W, other, place, values, agreed, entries in zip(
        problem.weights, others, problem.places, problem.values, problem.agreed, expected, strict=True
    ):
        wanted = [list(column) for column in zip(*entries, strict=True)] or [[], [], []]
        for found, column in zip((values, agreed, W[place]), wanted, strict=True):
            assert same(found, column)
        W[place] = other[place]
    after = problem.snapshot()
    for one, other in zip(before[: len(others)], after, strict=False):
        assert torch.equal(one, other), "an entry that is not selected has changed"
    if who == "nobody":
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_changes_nothing_where_all_agree(backend, device, dtype):
    """Not even a NaN whose payload rounding would not give back."""
    problem = AgreementProblem(device, dtype)
    problem.change(problem.values, torch.tensor(SPECIAL, device=device))
    problem.change_weights(torch.tensor(SPECIAL, device=device))
    for W, (rows, columns) in zip(problem.weights, problem.places, strict=True):
        if rows.numel() > 3:
            payload = torch.tensor([0x7FC12345 if dtype == torch.float32 else 0x7FC1], device=device)
            W[rows[3], columns[3]] = payload.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)[0]
    ops.agree_values_(*problem.arguments)
    before = problem.snapshot()
    ops.agree_values_(*problem.arguments)
    for one, other in zip(before, problem.snapshot(), strict=True):
        assert torch.equal(one, other)


def test_a_value_that_changed_wins(backend, device):
    W = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16, device=device)
    values, agreed = torch.tensor([1.5, 2.0], device=device), torch.tensor([1.0, 3.0], device=device)
    W[0, 2] = 7.0
    csr = torch.tensor([0, 2], dtype=INT, device=device), torch.tensor([2, 0], dtype=INT, device=device)
    ops.agree_values_([W], [csr[0]], [csr[1]], [values], [agreed])
    assert W.tolist() == [[2.0, 2.0, 1.5]]
    assert values.tolist() == agreed.tolist() == [1.5, 2.0]


def test_rounds_to_nearest_even(backend, device):
    W = torch.zeros(1, 4, dtype=torch.bfloat16, device=device)
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1e39], device=device)
    csr = torch.tensor([0, 4], dtype=INT, device=device), torch.arange(4, dtype=INT, device=device)
    ops.agree_values_([W], [csr[0]], [csr[1]], [values], [torch.zeros(4, device=device)])
    assert W.tolist() == [[1.0, 1 + 2**-6, 1 + 2**-7, float("inf")]]


def test_zeros_of_both_signs_differ(backend, device, dtype):
    W, values, agreed = torch.zeros(1, 2, dtype=dtype, device=device), *torch.zeros(2, 2, device=device)
    csr = torch.tensor([0, 2], dtype=INT, device=device), torch.arange(2, dtype=INT, device=device)
    values[0] = -0.0
    W[0, 1] = -0.0
    ops.agree_values_([W], [csr[0]], [csr[1]], [values], [agreed])
    for found in (W[0], values, agreed):
        assert found.signbit().tolist() == [True, True]


def test_long_rows_and_many_blocks(backend, device):
    """More entries than a block or a chunk of any backend has, with columns in no order."""
    W = torch.randn(7, 6000, device=device)
    counts = (6000, 0, 0, 5000, 1, 4097, 0)
    columns = torch.cat([torch.randperm(6000, device=device)[:n].to(INT) for n in counts])
    row_offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(INT)
    place = reference.entry_rows(row_offsets), columns.long()
    values = W[place]
    agreed = values.clone()
    values[::2] += 1
    expected = W.clone()
    expected[place] = values
    expected[:, 5] = 9.0
    W[:, 5] = 9.0
    was = expected[place]
    was[::2] = values[::2]
    expected[place] = was
    ops.agree_values_([W], [row_offsets], [columns], [values], [agreed])
    assert torch.equal(W, expected)
    assert torch.equal(values, W[place])
    assert torch.equal(agreed, values)


def test_nothing_to_do(backend, device):
    ops.agree_values_([], [], [], [], [])
    none = torch.empty(0, device=device)
    offsets, columns = torch.zeros(4, dtype=INT, device=device), torch.empty(0, dtype=INT, device=device)
    ops.agree_values_([torch.ones(3, 2, device=device)], [offsets], [columns], [none], [none.clone()])


def test_opcheck(backend, device, dtype):
    problem = AgreementProblem(device, dtype)
    problem.change(problem.values, torch.randn(9, device=device))
    torch.library.opcheck(ops.agree_values_, problem.arguments)


def test_bad_arguments():
    W, values, agreed = torch.ones(4, 6), torch.ones(2), torch.zeros(2)
    offsets, columns = torch.tensor([0, 1, 1, 2, 2], dtype=INT), torch.tensor([3, 5], dtype=INT)

    for change, error, match in (
        ({"values": []}, ValueError, "values must have one item per weight, got 0 for 1 weights"),
        ({"weights": [W.long()]}, TypeError, r"W\[0\] must be float32"),
        ({"row_offsets": [offsets[:-1]]}, ValueError, r"row_offsets\[0\] must have shape \[5\]"),
        ({"columns": [columns.long()]}, TypeError, r"columns\[0\] must be torch.int32"),
        ({"values": [values.double()]}, TypeError, r"values\[0\] must be torch.float32"),
        ({"agreed": [torch.ones(3)]}, ValueError, r"agreed\[0\] must have shape \[2\]"),
        ({"agreed": [torch.ones(4)[::2]]}, ValueError, r"agreed\[0\] must be contiguous"),
    ):
        arguments = {
            "weights": [W],
            "row_offsets": [offsets],
            "columns": [columns],
            "values": [values],
            "agreed": [agreed],
        }
        for op in (ops.agree_values_, ops.prepared_agreement):
            with pytest.raises(error, match=match):
                op(**(arguments | change))
    with pytest.raises(ValueError, match=r"agreed\[0\] must be on cpu"):
        ops.prepared_agreement([W], [offsets], [columns], [values], [agreed.to("meta")])
    assert torch.equal(W, torch.ones(4, 6))
    assert agreed.tolist() == [0, 0]
