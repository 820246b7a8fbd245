"""``sampled_grad`` and ``sampled_grad_conv2d`` on every backend, against the dense gradient in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference

INT = torch.int32


def random_csr(rows: int, columns: int, device: torch.device, density: float = 0.2) -> tuple[Tensor, Tensor]:
    """Rows of any length: one empty, one full."""
    mask = torch.rand(rows, columns, device=device) < density
    mask[0] = True
    if rows > 1:
        mask[1] = False
    row_offsets = torch.cat([torch.zeros(1, dtype=INT, device=device), mask.sum(1).cumsum(0).to(INT)])
    return row_offsets, mask.nonzero()[:, 1].to(INT)


def check(found: Tensor, gy: Tensor, unfolded: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Within 1e-5 of the size of the terms: products and sums are float32 whatever the inputs.

    ``gy`` ``[M, O]`` and ``unfolded`` ``[M, C]`` in float64.
    """
    expected = (gy.t() @ unfolded)[rows, columns]
    size = (gy.abs().t() @ unfolded.abs())[rows, columns]
    assert found.dtype == torch.float32
    assert found.shape == columns.shape
    assert bool(((found.double() - expected).abs() <= 1e-5 * size).all())


def layouts(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    M, O = shape
    return {
        "contiguous": torch.randn(M, O, device=device).to(dtype),
        "transposed": torch.randn(O, M, device=device).to(dtype).t(),
        "sliced": torch.randn(2 * M, 3 * O + 1, device=device).to(dtype)[::2, 1::3],
        "one row repeated": torch.randn(1, O, device=device).to(dtype).expand(M, O),
        "one number": torch.randn((), device=device).to(dtype).expand(M, O),
    }


LAYOUTS = list(layouts((1, 1), torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("x_layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("gy_layout", LAYOUTS)
def test_linear(backend, device, dtype, gy_layout, x_layout):
    M, O, C = 67, 37, 45
    gy = layouts((M, O), device, dtype)[gy_layout]
    x = layouts((M, C), device, dtype)[x_layout]
    row_offsets, columns = random_csr(O, C, device)
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(found, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())


@pytest.mark.parametrize(("M", "O", "C"), [(1, 1, 1), (300, 1, 5), (1, 19, 3), (129, 16, 64), (128, 33, 17), (513, 70, 1)])
def test_odd_sizes(backend, device, M, O, C):
    gy, x = torch.randn(M, O, device=device), torch.randn(M, C, device=device)
    row_offsets, columns = random_csr(O, C, device)
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(found, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())


@pytest.mark.parametrize("gy_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(backend, device, dtype, gy_dtype):
    gy, x = torch.randn(50, 20, device=device).to(gy_dtype), torch.randn(50, 30, device=device).to(dtype)
    row_offsets, columns = random_csr(20, 30, device)
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(found, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())


def test_leading_dimensions(backend, device):
    gy, x = torch.randn(5, 3, 4, 11, device=device), torch.randn(5, 4, 3, 9, device=device).transpose(1, 2)
    row_offsets, columns = random_csr(11, 9, device)
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(
        found,
        gy.double().reshape(-1, 11),
        x.double().reshape(-1, 9),
        reference.entry_rows(row_offsets),
        columns.long(),
    )
    one = ops.sampled_grad(gy[0, 0, 0], x[0, 0, 0], row_offsets, columns)
    check(one, gy[0, 0, :1].double(), x[0, 0, :1].double(), reference.entry_rows(row_offsets), columns.long())


def test_columns_in_any_order(backend, device):
    """A channels-last weight numbers its columns by where they lie in memory: they need not ascend."""
    gy, x = torch.randn(40, 6, device=device), torch.randn(40, 50, device=device)
    columns = torch.stack([torch.randperm(50, device=device)[:8] for _ in range(6)]).flatten().to(INT)
    row_offsets = torch.arange(7, dtype=INT, device=device) * 8
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(found, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())


def test_many_rows_few_entries(backend, device):
    """More rows of activations than any tile, entries in two columns of many: the sums still agree to 1e-5."""
    M = 700 if ops.interpreted() else 20_011
    gy, x = torch.randn(M, 9, device=device), torch.randn(M, 200, device=device)
    columns = torch.tensor([7, 199] * 9, dtype=INT, device=device)
    row_offsets = torch.arange(10, dtype=INT, device=device) * 2
    found = ops.sampled_grad(gy, x, row_offsets, columns)
    check(found, gy.double(), x.double(), reference.entry_rows(row_offsets), columns.long())


@pytest.mark.parametrize(("M", "nnz"), [(0, 3), (4, 0), (0, 0)])
def test_empty(backend, device, M, nnz):
    columns = torch.zeros(nnz, dtype=INT, device=device)
    row_offsets = torch.tensor([0, nnz, nnz], dtype=INT, device=device)
    found = ops.sampled_grad(torch.ones(M, 2, device=device), torch.ones(M, 3, device=device), row_offsets, columns)
    assert torch.equal(found, torch.zeros(nnz, device=device))


def test_nan_and_infinity_reach_their_entries_only(backend, device):
    gy, x = torch.randn(30, 4, device=device), torch.randn(30, 5, device=device)
    x[3, 2], gy[7, 1] = float("nan"), float("inf")
    row_offsets = torch.arange(5, dtype=INT, device=device) * 5
    columns = torch.arange(5, dtype=INT, device=device).repeat(4)
    found = ops.sampled_grad(gy, x, row_offsets, columns).view(4, 5)
    finite = torch.ones(4, 5, dtype=torch.bool, device=device)
    finite[:, 2] = finite[1] = False
    assert torch.equal(found.isfinite(), finite)
    assert bool(found[:, 2].isnan().all())


def test_same_result_for_any_number_of_threads(backend, device):
    gy, x = torch.randn(300, 100, device=device), torch.randn(300, 80, device=device)
    row_offsets, columns = random_csr(100, 80, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.sampled_grad(gy, x, row_offsets, columns))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


CONVOLUTIONS = {  # C_in, O, size, kernel, stride, padding (top, bottom, left, right), dilation, groups
    "3x3": (6, 10, (9, 11), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "patches": (3, 8, (12, 8), (4, 4), (4, 4), (0, 0, 0, 0), (1, 1), 1),
    "1x1": (7, 5, (6, 5), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1, stride 2": (7, 5, (7, 5), (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "grouped": (6, 8, (8, 8), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2),
    "depthwise 7x7": (5, 5, (9, 9), (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 5),
    "depthwise, two outputs": (4, 8, (5, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    "uneven": (4, 6, (10, 13), (3, 2), (2, 3), (0, 2, 1, 0), (2, 1), 2),
    "wide padding": (2, 3, (3, 3), (3, 3), (1, 1), (4, 4, 4, 4), (1, 1), 1),
}


def unfold(x: Tensor, kernel, stride, padding, dilation) -> Tensor:
    """``[B*L, C_in*kh*kw]`` in float64."""
    top, bottom, left, right = padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    return F.unfold(padded, kernel, dilation=dilation, stride=stride).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("memory", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(backend, device, dtype, name, memory):
    C_in, O, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    B = 3
    if memory == "sliced":
        x = torch.randn(B, C_in + 2, size[0] + 1, 2 * size[1], device=device).to(dtype)[:, 1:-1, 1:, ::2]
    else:
        x = torch.randn(B, C_in, *size, device=device).to(dtype)
    weight = torch.zeros(O, C_in // groups, *kernel, device=device, dtype=torch.float64)
    padded = F.pad(x.double(), (padding[2], padding[3], padding[0], padding[1]))
    y = F.conv2d(padded, weight, stride=stride, dilation=dilation, groups=groups)
    gy = torch.randn(y.shape, device=device).to(dtype)
    if memory == "channels last":
        x, gy = x.to(memory_format=torch.channels_last), gy.to(memory_format=torch.channels_last)
    elif memory == "sliced":
        gy = torch.cat([gy, gy], dim=3)[..., ::2].contiguous().expand(gy.shape) if gy.shape[3] == 1 else gy.flip(3).flip(3)
    C = weight[0].numel()
    row_offsets, columns = random_csr(O, C, device, density=0.3)
    found = ops.sampled_grad_conv2d(gy, x, row_offsets, columns, kernel, stride, padding, dilation, groups)
    rows = reference.entry_rows(row_offsets)
    unfolded_columns = rows // (O // groups) * C + columns
    flat = gy.double().flatten(2).transpose(1, 2).flatten(0, 1)
    check(found, flat, unfold(x, kernel, stride, padding, dilation), rows, unfolded_columns)


def test_empty_convolution(backend, device):
    gy, x = torch.ones(0, 2, 3, 3, device=device), torch.ones(0, 1, 5, 5, device=device)
    row_offsets, columns = torch.tensor([0, 1, 2], dtype=INT, device=device), torch.zeros(2, dtype=INT, device=device)
    found = ops.sampled_grad_conv2d(gy, x, row_offsets, columns, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert torch.equal(found, torch.zeros(2, device=device))


def test_opcheck(backend, device):
    gy, x = torch.randn(6, 4, device=device), torch.randn(6, 5, device=device)
    csr = random_csr(4, 5, device)
    torch.library.opcheck(torch.ops.fps_kernels.sampled_grad.default, (gy, x, *csr))
    gy, x = torch.randn(2, 4, 3, 3, device=device), torch.randn(2, 2, 5, 5, device=device)
    csr = random_csr(4, 18, device)
    geometry = ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    torch.library.opcheck(torch.ops.fps_kernels.sampled_grad_conv2d.default, (gy, x, *csr, *geometry))


def test_bad_input(backend, device):
    gy, x = torch.randn(6, 4, device=device), torch.randn(6, 5, device=device)
    row_offsets, columns = random_csr(4, 5, device)
    with pytest.raises(TypeError, match="gy must be float32"):
        ops.sampled_grad(gy.double(), x, row_offsets, columns)
    with pytest.raises(TypeError, match="x must be float32"):
        ops.sampled_grad(gy, x.long(), row_offsets, columns)
    with pytest.raises(ValueError, match="same leading dimensions"):
        ops.sampled_grad(gy, x[:5], row_offsets, columns)
    with pytest.raises(ValueError, match="row_offsets must have shape"):
        ops.sampled_grad(gy, x, row_offsets[:-1], columns)
    with pytest.raises(TypeError, match="columns must be torch.int32"):
        ops.sampled_grad(gy, x, row_offsets, columns.long())
    image, out = torch.randn(2, 2, 5, 5, device=device), torch.randn(2, 4, 3, 3, device=device)
    csr = random_csr(4, 18, device)
    with pytest.raises(ValueError, match="gy must have shape"):
        ops.sampled_grad_conv2d(out[..., 1:], image, *csr, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="stride must be 2 integers"):
        ops.sampled_grad_conv2d(out, image, *csr, (3, 3), (0, 1), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="does not fit"):
        ops.sampled_grad_conv2d(out, image, *csr, (7, 7), (1, 1), (0, 0, 0, 0), (1, 1), 1)
