"""The paths of the Triton launch functions that only large tensors take, forced onto small ones."""

import sys

import pytest
import torch

from fps_kernels.ops import reference
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Convolution

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def module(name: str):
    return sys.modules[f"fps_kernels.ops.triton.{name}"]


@pytest.fixture(autouse=True)
def fresh_plans():
    """What is changed here decides what is launched."""
    module("launching").forget_plans()
    yield
    module("launching").forget_plans()


@pytest.mark.parametrize("ord", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("programs", [1, 3, 6])
def test_column_norm_with_few_programs_for_many_tiles(monkeypatch, programs, ord):
    monkeypatch.setattr(module("column_norm"), "TARGET_PROGRAMS", programs)
    x = torch.randn(1000, 300, device=DEVICE)
    got, expected = torch.rand(2, 300, dtype=torch.float64, device=DEVICE)
    expected.copy_(got)
    backend.column_norm_(x, got, ord)
    reference.column_norm_(x, expected, ord)
    torch.testing.assert_close(got, expected, rtol=0 if ord == float("inf") else 1e-5, atol=0)


def test_column_norm_is_deterministic():
    x = torch.randn(5000, 3, device=DEVICE)
    first, second = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    backend.column_norm_(x, first, 1.0)
    backend.column_norm_(x, second, 1.0)
    assert torch.equal(first, second)


def test_column_norm_bounds_its_workspace(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **named: launched.append(arguments)

    monkeypatch.setattr(module("column_norm"), "_partial_norms", Kernel())
    for M, C in ((10**7, 1), (10**7, 768), (10**5, 200_000), (1, 5)):
        x = torch.empty(M, C, device="meta")
        partials = module("column_norm").launch_partial_norms(x, 1.0)
        assert launched[-1][1] is partials
        assert partials.numel() * 8 <= 8 * (528 * 256 + C)


@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_with_few_programs_for_many_blocks(monkeypatch, programs, layout):
    monkeypatch.setattr(module("column_norm_conv2d"), "TARGET_PROGRAMS", programs)
    x = torch.randn(5, 3, 40, 21, device=DEVICE).to(memory_format=layout)
    convolution = Convolution((3, 5), (1, 2), (1, 0, 2, 2), (2, 1), 3)
    got, expected = torch.zeros(2, 3, 15, dtype=torch.float64, device=DEVICE)
    backend.column_norm_conv2d_(x, got, convolution, 1.0)
    reference.column_norm_conv2d_(x, expected, convolution, 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ord", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("sums", [1, 200])
def test_column_norm_conv2d_of_images_too_large_for_one_workspace(monkeypatch, sums, ord, channels_last):
    """Some lines at a time, of which windows reach over the edges."""
    monkeypatch.setattr(module("column_norm_conv2d"), "MOST_SUMS", sums)
    x = torch.randn(3, 4, 9, 11, device=DEVICE)
    x[0, 1, 2, 3] = float("inf")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    got = torch.rand(1, 4 * 15, dtype=torch.float64, device=DEVICE)
    expected = got.clone()
    convolution = Convolution((3, 5), (1, 2), (1, 0, 2, 2), (2, 1), 1)
    backend.column_norm_conv2d_(x, got, convolution, ord)
    reference.column_norm_conv2d_(x, expected, convolution, ord)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fill", ["random", "tied", "nan"])
def test_topk_of_rows_too_long_for_registers(monkeypatch, fill):
    for name in ("MOST_ROUNDS", "MOST_REGISTER_COLUMNS", "MOST_REGISTER_COLUMNS_SM_8_9", "MOST_SCATTERED_COLUMNS"):
        monkeypatch.setattr(module("topk"), name, 0)
    W, a = torch.randn(2, 9001, device=DEVICE), torch.rand(1, 9001, device=DEVICE)
    if fill == "tied":
        W, a = (W * 2).round(), torch.ones_like(a)
    elif fill == "nan":
        W[:, ::7] = float("nan")
    for k in (2, 2500, 9001):
        assert torch.equal(backend.score_topk(W, a, k), reference.score_topk(W, a, k)), k


def test_kth_of_many_kinds_of_tensors_in_many_programs(monkeypatch):
    for name in ("LEAST_ENTRIES", "MOST_ENTRIES"):
        monkeypatch.setattr(module("entry_tables"), name, 500)
    weights = [
        torch.randn(37, 80, device=DEVICE),
        torch.randn(9, 260, device=DEVICE).bfloat16(),
        torch.randn(120, 9, device=DEVICE).half(),
        torch.randn(0, 5, device=DEVICE),
        torch.randn(64, 33, device=DEVICE).t(),
        torch.randn(8, 256, device=DEVICE).bfloat16(),
    ]
    factors = [torch.rand(1, W.shape[1], device=DEVICE) for W in weights]
    factors[2] = torch.rand(4, 9, device=DEVICE)
    for k in (1, 777, sum(W.numel() for W in weights)):
        for got, expected in zip(
            backend.score_kth(weights, factors, k), reference.score_kth(weights, factors, k), strict=True
        ):
            assert torch.equal(got, expected), k


def test_select_never_writes_beyond_nnz():
    """More lies above the threshold than there is room for: ``nnz`` is not checked on a GPU."""
    W, a = torch.rand(40, 50, device=DEVICE), torch.ones(1, 50, device=DEVICE)
    fenced = torch.full((400,), -1, dtype=torch.int32, device=DEVICE)
    real = torch.empty

    def empty(*shape, **options):
        return fenced[:10] if shape == (10,) else real(*shape, **options)

    torch.empty = empty
    try:
        module("threshold").launch_select(W, a, torch.tensor(0.5, device=DEVICE), 10)
    finally:
        torch.empty = real
    assert (fenced[10:] == -1).all()
    assert (fenced[:10] >= 0).all()


def sampled_grad_problem(M, O, C, dtype=torch.float32):
    """Rows without entries, with all of them, and with some in any order; two blocks of columns that nothing lies in."""
    gy, x = torch.randn(M, O, device=DEVICE).to(dtype), torch.randn(M, C, device=DEVICE).to(dtype)
    counts = [C if o == O // 2 else o % 7 for o in range(O)]
    row_offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    some = torch.cat([torch.randperm(min(C, 64), device=DEVICE)[:n] for n in counts if n != C] or [torch.empty(0)])
    before = sum(counts[: O // 2])
    columns = torch.cat([some[:before], torch.randperm(C, device=DEVICE), some[before:]]).int()
    return gy, x, row_offsets, columns


def close(found, gy, x, row_offsets, columns):
    expected = reference.sampled_grad(gy, x, row_offsets, columns)
    size = reference.sampled_grad(gy.abs(), x.abs(), row_offsets, columns)
    return bool(((found - expected).abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("product", [True, False], ids=["product", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampled_grad_both_ways(monkeypatch, product, dtype):
    monkeypatch.setattr(module("gradients"), "prefer_product", lambda nnz, gy, x: product)
    arguments = sampled_grad_problem(150, 150, 300, dtype)
    assert close(backend.sampled_grad(*arguments), *arguments)
    odd = arguments[0][:, 1:], arguments[1].t().contiguous().t(), arguments[2][1:], arguments[3]
    assert close(backend.sampled_grad(*odd), *odd)


def test_sampled_grad_of_more_rows_than_one_launch_takes(monkeypatch):
    gradients = module("gradients")
    monkeypatch.setattr(gradients, "prefer_product", lambda nnz, gy, x: True)
    monkeypatch.setattr(gradients, "MOST_SPLITS", 2)
    monkeypatch.setattr(gradients, "MOST_ROWS", dict.fromkeys(gradients.MOST_ROWS, 64))
    arguments = sampled_grad_problem(300, 20, 40)
    assert close(backend.sampled_grad(*arguments), *arguments)


@pytest.mark.parametrize("product", [True, False], ids=["product", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 30, 150, 301])
def test_sampled_grad_with_bias(monkeypatch, product, dtype, rows):
    """In one part, in several, and in several launches; the gradient keeps its bits."""
    gradients = module("gradients")
    monkeypatch.setattr(gradients, "prefer_product", lambda nnz, gy, x: product)
    monkeypatch.setattr(gradients, "PRODUCT_PROGRAMS", 20)
    monkeypatch.setattr(gradients, "GATHER_PROGRAMS", 20)
    if rows == 301:
        monkeypatch.setattr(gradients, "MOST_SPLITS", 2)
        monkeypatch.setattr(gradients, "MOST_ROWS", dict.fromkeys(gradients.MOST_ROWS, 64))
    arguments = sampled_grad_problem(rows, 150, 130, dtype)
    odd = arguments[0][:, 1:], arguments[1].t().contiguous().t(), arguments[2][1:], arguments[3]
    for gy, x, row_offsets, columns in (arguments, odd):
        grad, bias_grad = gradients.sampled_grad_with_bias(gy, x, row_offsets, columns)
        assert close(grad, gy, x, row_offsets, columns)
        expected, size = gy.double().sum(0), gy.double().abs().sum(0)
        assert bias_grad.dtype == torch.float32
        assert ((bias_grad - expected).abs() <= 3e-6 * size).all()
        again = gradients.sampled_grad_with_bias(gy, x, row_offsets, columns)
        assert torch.equal(grad, again[0])
        assert torch.equal(bias_grad, again[1])


def test_sampled_grad_with_bias_of_nothing():
    gradients = module("gradients")
    none, offsets = torch.empty(0, dtype=torch.int32, device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    gy, x = torch.randn(20, 7, device=DEVICE), torch.randn(20, 3, device=DEVICE)
    grad, bias_grad = gradients.sampled_grad_with_bias(gy, x, offsets, none)
    assert grad.numel() == 0
    torch.testing.assert_close(bias_grad, gy.sum(0))
    offsets[1:] = 1
    for found in gradients.sampled_grad_with_bias(gy[:0], x[:0], offsets, none.new_zeros(1)):
        assert not found.any()
    assert found.shape == (7,)


def test_sampled_grad_is_deterministic():
    arguments = sampled_grad_problem(300, 40, 70)
    assert torch.equal(backend.sampled_grad(*arguments), backend.sampled_grad(*arguments))


def test_sampled_grad_bounds_its_workspace():
    gradients = module("gradients")
    for M in (1, 100, 12_608, 10**6, 10**9):
        for tiles in (1, 50, 10_000):
            for programs, unit in ((gradients.PRODUCT_PROGRAMS, 32), (gradients.GATHER_PROGRAMS, 16), (1056, 1)):
                rows = gradients.rows_per_split(M, tiles, programs, unit)
                assert rows % unit == 0
                assert -(-M // rows) <= gradients.MOST_SPLITS
                if 2 * unit * gradients.MOST_SPLITS <= M and tiles * gradients.MOST_SPLITS >= 2 * programs:
                    assert tiles * -(-M // rows) >= programs / 2


def test_tiles_are_for_many_entries():
    prefer_product = module("gradients").prefer_product

    def operands(O, C, dtype):
        return (torch.empty(12_608, n, dtype=dtype, device="meta") for n in (O, C))

    assert prefer_product(4 * 3072, *operands(3072, 384, torch.float16))
    assert not prefer_product(768, *operands(768, 3072, torch.float16))
    for dtype in (torch.float16, torch.float32):
        assert prefer_product(3072 * 384 // 10, *operands(3072, 384, dtype))
        assert not prefer_product(100, *operands(3072, 384, dtype))
    assert not prefer_product(3072, *operands(3072, 160, torch.float32))


def test_updates_of_many_blocks():
    W = torch.zeros(7, 900, device=DEVICE)
    columns = torch.cat([torch.randperm(900, device=DEVICE)[:n].int() for n in (900, 0, 0, 513, 1, 899, 0)])
    row_offsets = torch.tensor([0, 900, 900, 900, 1413, 1414, 2313, 2313], dtype=torch.int32, device=DEVICE)
    values = torch.randn(2313, device=DEVICE)
    expected = W.clone()
    backend.scatter_values_(W, row_offsets, columns, values)
    reference.scatter_values_(expected, row_offsets, columns, values)
    assert torch.equal(W, expected)

    def step(op, weight):
        state = [torch.zeros(2313, device=DEVICE) for _ in range(2)]
        lrs = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
        steps = [torch.tensor(0.0, device=DEVICE)]
        tensors = [weight], [weight.sin()], [row_offsets], [columns], [torch.empty(0, device=DEVICE)], [state[0]], [state[1]]
        options = AdamWOptions(lrs, [0.1], 0.9, 0.999, 1e-8, False, None, None, False)
        op(AdamWTensors(*tensors, steps, [torch.empty(0, device=DEVICE)]), options)
        return weight

    torch.testing.assert_close(step(backend.masked_adamw_, W), step(reference.masked_adamw_, expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["one behind the other", "whole groups", "anyhow"])
def test_numbers_are_packed_by_positions_of_64_bits(monkeypatch, where, dtype, bits):
    monkeypatch.setattr(module("packing"), "INT32_END", 0)
    x = torch.randn(90, 97, device=DEVICE).to(dtype)
    if where == "whole groups":
        x = torch.randn(90, 96, device=DEVICE).to(dtype)[:, 16:80]
    elif where == "anyhow":
        x = x[:, ::2]
    else:
        x = x.view(-1)
    for key in (None, 2**32 - 1):
        codes, scales = backend.pack_groups(x, bits, key)
        wanted_codes, wanted_scales = reference.pack_groups(x, bits, key)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(scales, wanted_scales)
