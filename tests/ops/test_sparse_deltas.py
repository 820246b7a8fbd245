"""``sparse_delta_matmul_`` on every backend, against the dense product in float64."""

import pytest
import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference
from tests.ops.test_sampled_grad import INT, layouts, random_csr


def transposed(row_offsets: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``D.T``, and where each is among those of ``D``."""
    order = columns.long().argsort(stable=True)
    lengths = torch.bincount(columns.long(), minlength=width)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return offsets.to(INT), reference.entry_rows(row_offsets)[order].to(INT), order.to(INT)


def check(y: Tensor, before: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """Within 1e-5 of the size of the terms, and the rounding of the result."""
    delta = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64, device=y.device)
    delta[reference.entry_rows(row_offsets), columns.long()] = values.double()
    expected = before.double() + x.double() @ delta.t()
    size = before.double().abs() + x.double().abs() @ delta.abs().t()
    rounding = {torch.float32: 1e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[y.dtype]
    assert bool(((y.double() - expected).abs() <= (1e-5 + rounding) * size + 1e-7).all())


@pytest.mark.parametrize("y_layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("x_layout", ["contiguous", "transposed", "sliced", "one row repeated", "one number"])
def test_layouts(backend, device, dtype, x_layout, y_layout):
    M, O, C = 67, 37, 45
    x, y = layouts((M, C), device, dtype)[x_layout], layouts((M, O), device, dtype)[y_layout]
    row_offsets, columns = random_csr(O, C, device)
    values, before = torch.randn(columns.numel(), device=device), y.clone()
    ops.sparse_delta_matmul_(y, x, row_offsets, columns, values)
    check(y, before, x, row_offsets, columns, values)
    empty = row_offsets.diff() == 0
    assert torch.equal(y[:, empty], before[:, empty])


@pytest.mark.parametrize(("M", "O", "C"), [(1, 1, 1), (300, 1, 5), (1, 19, 3), (129, 16, 64), (64, 33, 17), (130, 70, 1)])
def test_odd_sizes_both_ways(backend, device, M, O, C):
    """The gradient of the input is the same op with the entries in another order."""
    x, y = torch.randn(M, C, device=device), torch.randn(M, O, device=device)
    row_offsets, columns = random_csr(O, C, device)
    values, before = torch.randn(columns.numel(), device=device), y.clone()
    ops.sparse_delta_matmul_(y, x, row_offsets, columns, values)
    check(y, before, x, row_offsets, columns, values)
    offsets, rows, order = transposed(row_offsets, columns, C)
    found, gradient = x.clone(), torch.randn(M, O, device=device)
    ops.sparse_delta_matmul_(found, gradient, offsets, rows, values, order)
    check(found, x, gradient, offsets, rows, values[order.long()])


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(backend, device, dtype, y_dtype):
    x, y = torch.randn(50, 30, device=device).to(dtype), torch.randn(50, 20, device=device).to(y_dtype)
    row_offsets, columns = random_csr(20, 30, device)
    values, before = torch.randn(columns.numel(), device=device), y.clone()
    ops.sparse_delta_matmul_(y, x, row_offsets, columns, values)
    check(y, before, x, row_offsets, columns, values)


def test_no_change_changes_nothing(backend, device, dtype):
    x, y = torch.randn(70, 30, device=device).to(dtype), torch.randn(70, 40, device=device).to(dtype)
    row_offsets, columns = random_csr(40, 30, device)
    before = y.clone()
    ops.sparse_delta_matmul_(y, x, row_offsets, columns, torch.zeros(columns.numel(), device=device))
    assert torch.equal(y, before)
    none = torch.zeros(41, dtype=INT, device=device)
    ops.sparse_delta_matmul_(y, x, none, columns[:0], torch.zeros(0, device=device))
    assert torch.equal(y, before)
    ops.sparse_delta_matmul_(y[:0], x[:0], row_offsets, columns, torch.ones(columns.numel(), device=device))


def test_threads_change_nothing(device):
    x, y = torch.randn(700, 60, device=device), torch.randn(700, 50, device=device)
    row_offsets, columns = random_csr(50, 60, device)
    values, found = torch.randn(columns.numel(), device=device), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(y.clone())
        ops.sparse_delta_matmul_(found[-1], x, row_offsets, columns, values)
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_opcheck(backend, device):
    row_offsets, columns = random_csr(6, 9, device)
    values = torch.randn(columns.numel(), device=device)
    order = torch.randperm(columns.numel(), device=device).to(INT)
    y, x = torch.randn(4, 6, device=device), torch.randn(4, 9, device=device)
    torch.library.opcheck(ops.sparse_delta_matmul_, (y, x, row_offsets, columns, values))
    torch.library.opcheck(ops.sparse_delta_matmul_, (y, x, row_offsets, columns, values, order))


Y, X = torch.ones(4, 2), torch.ones(4, 3)
CSR = torch.tensor([0, 1, 2], dtype=INT), torch.tensor([0, 2], dtype=INT)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((Y.long(), X, *CSR, torch.ones(2)), TypeError, "y must be float32"),
        ((Y, X.double(), *CSR, torch.ones(2)), TypeError, "x must be float32"),
        ((Y, X[:3], *CSR, torch.ones(2)), ValueError, "with as many rows"),
        ((Y, X, *CSR, torch.ones(3)), ValueError, r"values must have shape \[2\]"),
        ((Y, X, *CSR, torch.ones(2).half()), TypeError, "values must be torch.float32"),
        ((Y, X, *CSR, torch.ones(2), CSR[1].long()), TypeError, "order must be torch.int32"),
        ((Y, X, CSR[0][:2], CSR[1], torch.ones(2)), ValueError, r"row_offsets must have shape \[3\]"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ops.sparse_delta_matmul_(*arguments)
