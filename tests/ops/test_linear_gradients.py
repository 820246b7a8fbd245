"""The call that the backward pass of a linear map makes, on every backend, against dense gradients in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference
from tests.ops.test_sampled_grad import LAYOUTS, check, layouts, random_csr


def call(
    gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, bias: bool = True, how: ops.Recomputed | None = None
) -> tuple[Tensor, Tensor | None]:
    csr = ops.Csr(row_offsets, columns)
    found: tuple[Tensor, Tensor | None] = ops.implementation("sampled_grad", gy.device).linear_gradients(
        gy, x, csr, bias, how
    )
    return found


def check_bias(found: Tensor, gy: Tensor) -> None:
    """As torch sums: rounded to the dtype of ``gy`` at the end, at most."""
    expected, size = gy.double().reshape(-1, gy.shape[-1]).sum(0), gy.double().abs().reshape(-1, gy.shape[-1]).sum(0)
    error = (found.double() - expected).abs()
    assert bool((error <= 1e-5 * size + torch.finfo(gy.dtype).eps * expected.abs()).all())


@pytest.mark.parametrize("x_layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("gy_layout", LAYOUTS)
@pytest.mark.parametrize("M", [1, 5, 16, 67])
def test_entries_and_bias(backend, device, dtype, gy_layout, x_layout, M):
    O, C = 37, 45
    gy, x = layouts((M, O), device, dtype)[gy_layout], layouts((M, C), device, dtype)[x_layout]
    row_offsets, columns = random_csr(O, C, device)
    grad, bias = call(gy, x, row_offsets, columns)
    check(grad, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())
    check_bias(bias, gy)
    alone, none = call(gy, x, row_offsets, columns, bias=False)
    assert torch.equal(alone, grad)
    assert none is None


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)], ids=str)
def test_leading_dimensions(backend, device, shape):
    gy, x = torch.randn(*shape, 6, device=device), torch.randn(*shape, 9, device=device)
    row_offsets, columns = random_csr(6, 9, device)
    grad, bias = call(gy, x, row_offsets, columns)
    rows = reference.entry_rows(row_offsets)
    check(grad, gy.double().reshape(-1, 6), x.double().reshape(-1, 9), rows, columns.long())
    check_bias(bias, gy)


@pytest.mark.parametrize(("M", "entries"), [(0, True), (3, False), (0, False)])
def test_nothing(backend, device, M, entries):
    gy, x = torch.randn(M, 4, device=device), torch.randn(M, 7, device=device)
    row_offsets, columns = random_csr(4, 7, device)
    if not entries:
        row_offsets, columns = torch.zeros_like(row_offsets), columns[:0]
    grad, bias = call(gy, x, row_offsets, columns)
    assert torch.equal(grad, torch.zeros(columns.numel(), device=device))
    check_bias(bias, gy)


def test_many_rows(backend, device):
    """The sum of a bias is taken in parts: in one it would lose a digit for every ten thousand numbers."""
    if ops.interpreted():
        pytest.skip("interpreted, this many rows take minutes")
    gy, x = torch.rand(9000, 7, device=device), torch.randn(9000, 3, device=device)
    row_offsets, columns = random_csr(7, 3, device)
    grad, bias = call(gy, x, row_offsets, columns)
    check(grad, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())
    check_bias(bias, gy)


def recomputed(kind: str, M: int, C: int) -> tuple[Tensor, ops.Recomputed, Tensor]:
    """What an operation keeps of its input, and its output in float64."""
    x = torch.randn(M, C) * 4
    if kind.startswith("gelu"):
        x[0, : min(C, 4)] = torch.tensor([0.0, -0.0, 40.0, -40.0])[: min(C, 4)]
        how = ops.Recomputed(ops.GELU_TANH if kind == "gelu tanh" else ops.GELU)
        return x, how, F.gelu(x.double(), approximate="tanh" if kind == "gelu tanh" else "none")
    weight = None if kind == "norm" else torch.randn(C)
    bias = torch.randn(C) if kind == "norm, weight, bias" else None
    _, mean, scale = torch.native_layer_norm(x, [C], weight, bias, 1e-5)
    doubled = (None if p is None else p.double() for p in (weight, bias))
    return x, ops.Recomputed(ops.LAYER_NORM, mean, scale, weight, bias), F.layer_norm(x.double(), [C], *doubled)


@pytest.mark.skipif(ops.interpreted(), reason="Triton's kernels take inputs that are there")
@pytest.mark.parametrize("kind", ["gelu", "gelu tanh", "norm", "norm, weight", "norm, weight, bias"])
@pytest.mark.parametrize(("M", "C"), [(1, 3), (16, 40), (67, 45), (700, 33)])
def test_inputs_that_are_computed_again(backend, device, kind, M, C):
    if not ops.implementation("sampled_grad", device).RECOMPUTES:
        pytest.skip("this backend takes inputs that are there")
    x, how, output = recomputed(kind, M, C)
    gy = torch.randn(M, 19)
    row_offsets, columns = random_csr(19, C, device)
    grad, bias = call(gy, x, row_offsets, columns, how=how)
    check(grad, gy.double(), output, reference.entry_rows(row_offsets), columns.long())
    check_bias(bias, gy)


@pytest.mark.skipif(ops.interpreted(), reason="of the native kernel")
def test_threads_change_nothing():
    x, how, _ = recomputed("gelu", 4000, 90)
    gy, (row_offsets, columns) = torch.randn(4000, 70), random_csr(70, 90, torch.device("cpu"))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(call(gy, x, row_offsets, columns, how=how))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
