"""``column_norm_`` and ``column_norm_conv2d_`` on every backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import Convolution, reference

RELATIVE_BOUND = 1e-5  # stated in the docstring of column_norm_
SHAPES = [(1, 1), (5, 3), (63, 60), (129, 33), (257, 130), (2, 515)]
ORDS = [1.0, 2.0, float("inf")]


def expected_norm(x: Tensor, acc: Tensor, ord: float) -> Tensor:
    magnitude = x.reshape(-1, x.shape[-1]).double().abs()
    if ord == float("inf"):
        return torch.maximum(acc, magnitude.amax(0)) if len(magnitude) else acc.clone()
    return acc + magnitude.pow(ord).sum(0)


def assert_norm(got: Tensor, expected: Tensor, ord: float) -> None:
    rtol = 0 if ord == float("inf") else RELATIVE_BOUND  # a maximum is one of its inputs
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, device, dtype, shape, ord):
    x = torch.randn(shape, device=device).to(dtype)
    acc = torch.rand(shape[1], dtype=torch.float64, device=device)
    expected = expected_norm(x, acc, ord)
    assert ops.column_norm_(x, acc, ord) is None
    assert_norm(acc, expected, ord)


def strided_inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    base = torch.randn(37, 4, 22, device=device).to(dtype)
    return {
        "transposed": base[:, 0].t(),
        "sliced columns": base[:, 1, 3:17],
        "every second row": base[::2, 2],
        "every third column": base[:, 3, ::3],
        "three dimensions": base,
        "leading dimensions that do not merge": base[:, :3].transpose(0, 1),
        "expanded row": base[0, 0].expand(9, 22),
        "expanded column": base[:, 0, :1].expand(37, 5),
        "one dimension": base[0, 0],
        "unaligned": base.flatten()[1 : 1 + 36 * 21].view(36, 21),
    }


@pytest.mark.parametrize("name", list(strided_inputs(torch.device("cpu"), torch.float32)))
def test_strided(backend, device, dtype, name):
    x = strided_inputs(device, dtype)[name]
    acc = torch.zeros(x.shape[-1], dtype=torch.float64, device=device)
    ops.column_norm_(x, acc, 1.0)
    assert_norm(acc, expected_norm(x, torch.zeros_like(acc), 1.0), 1.0)


@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (0, 3, 7)])
def test_empty(backend, device, shape):
    acc = torch.rand(shape[-1], dtype=torch.float64, device=device)
    before = acc.clone()
    ops.column_norm_(torch.empty(shape, device=device), acc, 1.0)
    assert torch.equal(acc, before)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_reaches_the_accumulator(backend, device, dtype, ord, bad):
    x = torch.randn(41, 19, device=device).to(dtype)
    x[23, 7] = bad
    acc = torch.zeros(19, dtype=torch.float64, device=device)
    ops.column_norm_(x, acc, ord)
    assert not acc[7].isfinite()
    assert acc[torch.arange(19, device=device) != 7].isfinite().all()


def test_parts_add_up(backend, device):
    x = torch.randn(100, 17, device=device)
    whole = torch.zeros(17, dtype=torch.float64, device=device)
    parts = whole.clone()
    ops.column_norm_(x, whole, 1.0)
    for part in x.split([1, 30, 69]):
        ops.column_norm_(part, parts, 1.0)
    torch.testing.assert_close(parts, whole, rtol=2 * RELATIVE_BOUND, atol=0)


def test_large_and_tiny_values(backend, device):
    x = torch.tensor([[1e-38, 3e38, 1e-45]], device=device).expand(5, 3)
    acc = torch.zeros(3, dtype=torch.float64, device=device)
    ops.column_norm_(x, acc, float("inf"))
    assert torch.equal(acc, x[0].double())


CONVOLUTIONS = {
    "patch embedding": {"shape": (2, 3, 12, 8), "kernel": (4, 4), "stride": (4, 4)},
    "3x3 same": {"shape": (2, 4, 7, 9), "kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "1x1": {"shape": (3, 5, 4, 3), "kernel": (1, 1)},
    "strided": {"shape": (2, 3, 11, 10), "kernel": (3, 3), "stride": (2, 3), "padding": (1, 0, 2, 1)},
    "dilated": {"shape": (1, 2, 13, 12), "kernel": (3, 2), "dilation": (2, 3), "padding": (2, 2, 1, 1)},
    "depthwise 7x7": {"shape": (2, 6, 9, 8), "kernel": (7, 7), "padding": (3, 3, 3, 3), "groups": 6},
    "grouped": {"shape": (2, 6, 5, 6), "kernel": (3, 1), "stride": (1, 2), "groups": 3},
    "pixels never used": {"shape": (1, 2, 8, 9), "kernel": (2, 2), "stride": (3, 5)},
    "larger than the image": {"shape": (1, 2, 2, 3), "kernel": (5, 5), "padding": (2, 2, 2, 2)},
}


def geometry(case: dict) -> Convolution:
    stride, padding = case.get("stride", (1, 1)), case.get("padding", (0, 0, 0, 0))
    return Convolution(case["kernel"], stride, padding, case.get("dilation", (1, 1)), case.get("groups", 1))


def run_convolution(x: Tensor, case: dict, acc: Tensor, ord: float) -> Tensor:
    ops.column_norm_conv2d_(x, acc, *geometry(case), ord)
    return acc


def expected_of_convolution(x: Tensor, case: dict, acc: Tensor, ord: float) -> Tensor:
    reference.column_norm_conv2d_(x, acc, geometry(case), ord)
    return acc


def convolution_accumulator(case: dict, device: torch.device) -> Tensor:
    groups = case.get("groups", 1)
    columns = case["shape"][1] // groups * case["kernel"][0] * case["kernel"][1]
    return torch.rand(groups, columns, dtype=torch.float64, device=device)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolution_matches_unfold(backend, device, name, layout, ord):
    case = CONVOLUTIONS[name]
    x = torch.randn(case["shape"], device=device)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = F.pad(x, (1, 2, 3, 0))[:, :, 3:, 1:-2]
    acc = convolution_accumulator(case, device)
    expected = expected_of_convolution(x, case, acc.clone(), ord)
    run_convolution(x, case, acc, ord)
    assert_norm(acc, expected, ord)


def test_convolution_dtypes(backend, device, dtype):
    case = CONVOLUTIONS["strided"]
    x = torch.randn(case["shape"], device=device).to(dtype)
    acc = convolution_accumulator(case, device)
    expected = expected_of_convolution(x, case, acc.clone(), 1.0)
    assert_norm(run_convolution(x, case, acc, 1.0), expected, 1.0)


def test_convolution_columns_are_what_the_weight_multiplies(backend, device):
    """Independent of unfold: with a non-negative input, sum_j w_j * norm_j is the summed output of the convolution."""
    x, weight = torch.rand(2, 4, 9, 7, device=device), torch.randn(6, 2, 3, 2, device=device)
    acc = torch.zeros(2, 12, dtype=torch.float64, device=device)
    ops.column_norm_conv2d_(x, acc, [3, 2], [2, 1], [1, 1, 0, 0], [1, 2], 2, 1.0)
    output = F.conv2d(x.double(), weight.double(), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    by_norm = torch.cat([weight[:3].double().flatten(1) @ acc[0], weight[3:].double().flatten(1) @ acc[1]])
    torch.testing.assert_close(by_norm, output.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_convolution_empty_and_non_finite(backend, device):
    case = CONVOLUTIONS["3x3 same"]
    acc = convolution_accumulator(case, device)
    before = acc.clone()
    run_convolution(torch.empty(0, 4, 7, 9, device=device), case, acc, 1.0)
    assert torch.equal(acc, before)
    x = torch.randn(case["shape"], device=device)
    x[0, 2, 3, 3] = float("nan")
    run_convolution(x, case, acc, 1.0)
    assert acc.view(4, 9).isfinite().all(1).tolist() == [True, True, False, True]


def test_opcheck(backend, device):
    acc = torch.zeros(6, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.column_norm_, (torch.randn(5, 6, device=device), acc, 1.0))
    image = torch.randn(1, 2, 4, 4, device=device)
    acc = torch.zeros(1, 8, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.column_norm_conv2d_, (image, acc, [2, 2], [1, 1], [0, 0, 0, 0], [1, 1], 1, 1.0))


@pytest.mark.parametrize(
    ("x", "acc", "ord", "error", "match"),
    [
        (torch.ones(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64), 1.0, TypeError, "x must be float32"),
        (torch.ones(3, 2), torch.zeros(2), 1.0, TypeError, "acc must be torch.float64"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.float64), 1.0, ValueError, "acc must have shape"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.float64), 3.0, ValueError, "ord must be 1, 2 or inf"),
        (torch.tensor(1.0), torch.zeros(1, dtype=torch.float64), 1.0, ValueError, "at least one dimension"),
    ],
)
def test_bad_arguments(x, acc, ord, error, match):
    before = acc.clone()
    with pytest.raises(error, match=match):
        ops.column_norm_(x, acc, ord)
    assert torch.equal(acc, before)
