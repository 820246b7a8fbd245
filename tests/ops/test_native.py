"""What only the native backend promises: the same bits whatever the threads and (sampled gradients apart) the instruction
set, exact thresholds whatever the distribution, offsets beyond 2^31, bounded scratch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fps_kernels.ops import native, reference
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from tests.support.processes import run_python

INF = float("inf")


@pytest.fixture(params=native.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_selection(rows: int, cols: int, density: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand(rows, cols) < density
    row_offsets = torch.zeros(rows + 1, dtype=torch.int32)
    row_offsets[1:] = mask.sum(1).cumsum(0)
    return row_offsets, mask.nonzero()[:, 1].int()


# ------------------------------------------------------------------------------------------------ same bits


def column_norm(dtype: torch.dtype, ord: float, transposed: bool = False) -> Callable[[], list[Tensor]]:
    x = torch.randn(1500, 333).to(dtype)
    x = x.t().contiguous().t() if transposed else x

    def run() -> list[Tensor]:
        acc = torch.zeros(333, dtype=torch.float64)
        native.column_norm_(x, acc, ord)
        return [acc]

    return run


def column_norm_conv2d(channels_last: bool, stride: int) -> Callable[[], list[Tensor]]:
    x = torch.randn(17, 24, 30, 31)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def run() -> list[Tensor]:
        acc = torch.zeros(2, 12 * 15, dtype=torch.float64)
        native.column_norm_conv2d_(x, acc, Convolution((3, 5), (stride, 1), (1, 0, 2, 2), (1, 2), 2), 1.0)
        return [acc]

    return run


def topk(k: int) -> Callable[[], list[Tensor]]:
    W, a = torch.randn(300, 500), torch.rand(1, 500)
    return lambda: [native.score_topk(W, a, k)]


def threshold(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    weights = [torch.randn(shape).to(dtype) for shape in ((900, 1000), (0, 7), (333, 3001))]
    factors = [torch.rand(1, W.shape[1]) for W in weights]

    def run() -> list[Tensor]:
        kth, greater, equal = native.score_kth(weights, factors, 20_000)
        chosen = [kth, greater, equal]
        for W, a, above, same in zip(weights, factors, greater.tolist(), equal.tolist(), strict=True):
            if W.numel():
                chosen += native.score_select(W, a, kth, above + same // 2)
        return chosen

    return run


def update(weight_dtype: torch.dtype, grad_dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    W, grad = torch.randn(400, 500).to(weight_dtype), torch.randn(400, 500).to(grad_dtype)
    row_offsets, columns = random_selection(400, 500, 0.1)
    state = [torch.rand(columns.numel()) for _ in range(3)]
    lrs = torch.tensor([1e-2], dtype=torch.float64)

    def run() -> list[Tensor]:
        tuned, (master, exp_avg, exp_avg_sq), step = W.clone(), [s.clone() for s in state], torch.tensor(3.0)
        lists = ([tuned], [grad], [row_offsets], [columns], [master], [exp_avg], [exp_avg_sq], [step])
        rest = lrs, [0.1], 0.9, 0.999, 1e-8, False, torch.tensor(2.0), torch.tensor(0.0), False
        native.masked_adamw_(AdamWTensors(*lists, [torch.empty(0)]), AdamWOptions(*rest))
        native.scatter_values_(tuned, row_offsets, columns, master)
        return [tuned, master, exp_avg, exp_avg_sq, step]

    return run


def agreement(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    W = torch.randn(400, 500).to(dtype)
    row_offsets, columns = random_selection(400, 500, 0.1)
    values, agreed = torch.randn(2, columns.numel())
    values[::2] = agreed[::2]

    def run() -> list[Tensor]:
        changed = [t.clone() for t in (W, values, agreed)]
        native.agree_values_(Agreement(changed[:1], [row_offsets], [columns], changed[1:2], changed[2:]))
        return changed

    return run


CASES: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
    "column_norm": lambda: column_norm(torch.float32, 1.0),
    "column_norm square": lambda: column_norm(torch.float16, 2.0),
    "column_norm max": lambda: column_norm(torch.bfloat16, INF),
    "column_norm transposed": lambda: column_norm(torch.float32, 1.0, transposed=True),
    "conv2d": lambda: column_norm_conv2d(False, 1),
    "conv2d stride": lambda: column_norm_conv2d(False, 3),
    "conv2d channels-last": lambda: column_norm_conv2d(True, 1),
    "topk 1": lambda: topk(1),
    "topk 9": lambda: topk(9),
    "topk 100": lambda: topk(100),
    "threshold": lambda: threshold(torch.float32),
    "threshold ties": lambda: threshold(torch.bfloat16),
    "adamw": lambda: update(torch.float32, torch.float32),
    "adamw 16 bit": lambda: update(torch.bfloat16, torch.float16),
    "agreement": lambda: agreement(torch.float32),
    "agreement 16 bit": lambda: agreement(torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_depend_on_neither_threads_nor_instruction_set(case: str, restored_threads: None) -> None:
    run = CASES[case]()
    results = {}
    for isa in native.supported_isas():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with native.use_isa(isa):
                results[isa, threads] = run()
    first = results["base", 1]
    for which, result in results.items():
        for one, other in zip(first, result, strict=True):
            assert torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), which


# ------------------------------------------------------------------------------------------------ sampled gradients


def conv2d_gradient(
    memory_format: torch.memory_format, channels: int, outputs: int, size: int, kernel: int, stride: int, groups: int
) -> Callable[[], Tensor]:
    x = torch.randn(6, channels, size, size).contiguous(memory_format=memory_format)
    padding = kernel // 2
    positions = (size + 2 * padding - kernel) // stride + 1
    gy = torch.randn(6, outputs, positions, positions).contiguous(memory_format=memory_format)
    csr = random_selection(outputs, channels // groups * kernel * kernel, 0.1)
    convolution = Convolution((kernel,) * 2, (stride,) * 2, (padding,) * 4, (1, 1), groups)
    return lambda: native.sampled_grad_conv2d(gy, x, *csr, convolution)


def linear_gradient(rows: int, outputs: int, columns: int, density: float) -> Callable[[], Tensor]:
    gy, x = torch.randn(rows, outputs), torch.randn(rows, columns)
    csr = random_selection(outputs, columns, density)
    return lambda: native.sampled_grad(gy, x, *csr)


GRADIENTS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "linear": lambda: linear_gradient(2000, 300, 400, 0.05),
    "long": lambda: linear_gradient(20_000, 70, 40, 0.2),  # more slices than are added without compensation
    "wide": lambda: linear_gradient(500, 64, 9000, 0.01),  # planes of several slices would be too large
    "3x3": lambda: conv2d_gradient(torch.contiguous_format, 48, 80, 28, 3, 1, 1),
    "3x3, channels last": lambda: conv2d_gradient(torch.channels_last, 48, 80, 28, 3, 2, 1),
    "depthwise": lambda: conv2d_gradient(torch.contiguous_format, 100, 100, 28, 7, 1, 100),
    "depthwise, channels last": lambda: conv2d_gradient(torch.channels_last, 100, 200, 28, 5, 1, 100),
    "groups": lambda: conv2d_gradient(torch.contiguous_format, 96, 60, 28, 3, 1, 3),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_do_not_depend_on_threads(isa: str, name: str, restored_threads: None) -> None:
    run = GRADIENTS[name]()
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run())
    for result in results[1:]:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


@pytest.mark.parametrize("rows", [7_000, 400_000])
def test_gradients_of_many_equal_terms(isa: str, rows: int) -> None:
    """Roundings of equal terms all go the same way: the sums must hold their bound all the same."""
    gy, x = torch.full((1, 1), 1 / 3).expand(rows, 4), torch.full((1, 1), 0.7).expand(rows, 3)
    csr = torch.arange(5, dtype=torch.int32) * 3, torch.arange(3, dtype=torch.int32).repeat(4)
    expected = torch.full((12,), rows * float(gy[0, 0]) * float(x[0, 0]), dtype=torch.float64)
    torch.testing.assert_close(native.sampled_grad(gy, x, *csr).double(), expected, rtol=1e-5, atol=0)


def test_infinite_gradients_stay_infinite(isa: str) -> None:
    """Compensated sums, too: infinity minus itself is no number, but infinity is the sum."""
    x = torch.ones(20_000, 2)
    x[9_000, 0] = float("inf")
    csr = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    assert native.sampled_grad(torch.ones(20_000, 1), x, *csr).tolist() == [INF, 20_000]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads how much memory Linux has mapped")
def test_gradients_need_1_kib_per_column() -> None:
    """Within that they run; without it they raise."""
    code = (
        "import resource, torch\n"
        "from fps_kernels.ops import native\n"
        "torch.set_num_threads(1)\n"
        "def grad(columns, mib):\n"
        "    gy, x = torch.ones(1, 1).expand(480, 1), torch.ones(1, 1).expand(480, columns)\n"
        "    csr = torch.tensor([0, columns], dtype=torch.int32), torch.arange(columns, dtype=torch.int32)\n"
        "    mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * 2**20, resource.RLIM_INFINITY))\n"
        "    try: return bool((native.sampled_grad(gy, x, *csr) == 480).all())\n"
        "    except MemoryError as error: return error\n"
        "print(grad(100, 50), grad(100_000, 110), grad(200_000, 110))"
    )
    result = run_python(code)
    assert result.stdout.strip() == "True True fps_kernels: no memory for the scratch of a native kernel", result.stderr


# ------------------------------------------------------------------------------------------------ exact choices


@pytest.mark.parametrize("k", [1, 2, 8, 9, 20, 32, 33, 64, 384, 767, 768])
def test_topk_of_rows_as_wide_as_a_transformer(isa: str, k: int) -> None:
    W, a = torch.randn(64, 768), torch.rand(2, 768)
    W[5] = W[5].sort().values
    W[6] = W[6].sort(descending=True).values
    W[7] = 1.0
    W[8] = torch.randint(-3, 4, (768,)).float()
    W[9, ::3] = float("nan")
    W[10] = 0.0
    W[11] = torch.arange(768) % 64 == 3  # everything large falls into one group of columns
    a[:, 100:200] = 1.0
    assert torch.equal(native.score_topk(W, a, k), reference.score_topk(W, a, k))


def distributions() -> dict[str, Callable[[], Tensor]]:
    """Matrices of over 2^20 entries, for which score_kth samples, that defeat a sample in different ways."""
    shape = (1200, 1024)

    def one_block() -> Tensor:  # what is wanted hides between the runs that are sampled
        W = torch.rand(shape)
        W[600, :300] += 5.0
        return W

    def sparse() -> Tensor:
        return torch.randn(shape) * (torch.rand(shape) < 0.005)

    def with_nan() -> Tensor:
        W = torch.randn(shape)
        W[torch.rand(shape) < 0.02] = float("nan")
        return W

    return {
        "normal": lambda: torch.randn(shape),
        "all equal": lambda: torch.full(shape, 0.5),
        "all zero": lambda: torch.zeros(shape),
        "bimodal": lambda: torch.where(torch.rand(shape) < 0.01, 100.0, 1.0) * (1 + 1e-3 * torch.rand(shape)),
        "few values": lambda: torch.randint(-3, 4, shape).float(),
        "sparse": sparse,
        "sorted": lambda: torch.randn(shape).flatten().sort().values.view(shape),
        "one block": one_block,
        "heavy rows": lambda: torch.randn(shape) * (torch.arange(shape[0]) % 100 == 0).float().mul(50).add(1)[:, None],
        "all magnitudes": lambda: torch.pow(10.0, torch.rand(shape) * 76 - 45),
        "denormal": lambda: torch.randn(shape) * 1e-41,
        "NaN": with_nan,
        "all NaN": lambda: torch.full(shape, float("nan")),
    }


@pytest.mark.parametrize("name", distributions())
def test_kth_is_exact_whatever_the_distribution(name: str) -> None:
    W = distributions()[name]()
    weights, factors = [W, W[:0], W[:100] * 0.5], [torch.ones(1, W.shape[1])] * 3
    transposed = [W.t().contiguous().t() for W in weights]
    ranked = torch.cat([W.abs().flatten() for W in weights]).sort(descending=True).values  # NaN sorts first
    for k in (1, 300, ranked.numel() // 100, ranked.numel() // 2, ranked.numel()):
        expected = ranked[k - 1]
        above = [int(((W.abs() > expected) | (W.isnan() & ~expected.isnan())).sum()) for W in weights]
        same = [int((W.isnan() if expected.isnan() else W.abs() == expected).sum()) for W in weights]
        for isa in native.supported_isas():
            for layout in (weights, transposed):
                with native.use_isa(isa):
                    kth, greater, equal = native.score_kth(layout, factors, k)
                torch.testing.assert_close(kth, expected, rtol=0, atol=0, equal_nan=True)
                assert (greater.tolist(), equal.tolist()) == (above, same)


def test_select_refuses_a_wrong_count(isa: str) -> None:
    W, a = torch.randn(100, 300), torch.ones(1, 300)
    above = int((W.abs() > 1).sum())
    for nnz in (0, above - 1, above + 1, 30_000):
        with pytest.raises(ValueError, match="nnz"):
            native.score_select(W, a, torch.tensor(1.0), nnz)


# ------------------------------------------------------------------------------------------------ addresses


def far_apart(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``[rows, cols]`` whose last row begins beyond element 2^31; the pages between are never touched."""
    pitch = 2**31 // (rows - 1) + 64
    return torch.empty((rows - 1) * pitch + cols, dtype=dtype).as_strided((rows, cols), (pitch, 1))


def test_offsets_beyond_31_bits(isa: str) -> None:
    near = torch.randn(3, 500).to(torch.bfloat16)
    far = far_apart(3, 500)
    far.copy_(near)
    a = torch.rand(1, 500)

    norms = [torch.zeros(500, dtype=torch.float64) for _ in range(2)]
    native.column_norm_(far, norms[0], 1.0)
    native.column_norm_(near, norms[1], 1.0)
    assert torch.equal(*norms)

    images = [x.as_strided((3, 5, 10, 10), (x.stride(0), 100, 10, 1)) for x in (far, near)]
    norms = [torch.zeros(1, 45, dtype=torch.float64) for _ in range(2)]
    for x, acc in zip(images, norms, strict=True):
        native.column_norm_conv2d_(x, acc, Convolution((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), 1.0)
    assert torch.equal(*norms)

    csr = random_selection(500, 500, 0.1)
    assert torch.equal(native.sampled_grad(far, far, *csr), native.sampled_grad(near, near, *csr))
    csr, convolution = random_selection(5, 45, 0.5), Convolution((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    found, expected = (native.sampled_grad_conv2d(x, x, *csr, convolution) for x in images)
    assert torch.equal(found, expected)

    assert torch.equal(native.score_topk(far, a, 5), native.score_topk(near, a, 5))
    for found, expected in zip(native.score_kth([far], [a], 99), native.score_kth([near], [a], 99), strict=True):
        assert torch.equal(found, expected)
    kth, greater, equal = native.score_kth([far], [a], 99)
    chosen = native.score_select(far, a, kth, int(greater + equal))
    for found, expected in zip(chosen, reference.score_select(near, a, kth, int(greater + equal)), strict=True):
        assert torch.equal(found, expected)

    row_offsets, columns = chosen
    nnz = columns.numel()
    tuned = []
    for W in (far, near):
        lists = ([W], [W], [row_offsets], [columns], *([torch.full((nnz,), x)] for x in (0.5, 0.0, 0.0)), [torch.zeros(())])
        lrs = torch.ones(1, dtype=torch.float64)
        options = AdamWOptions(lrs, [0.0], 0.9, 0.999, 1e-8, False, None, None, False)
        native.masked_adamw_(AdamWTensors(*lists, [torch.empty(0)]), options)
        tuned.append(W.clone())
        native.scatter_values_(W, row_offsets, columns, torch.arange(nnz).float())
        tuned.append(W.clone())
        values, agreed = torch.arange(nnz).float() + 0.5, torch.arange(nnz).float()
        values[::2] -= 0.5
        native.agree_values_(Agreement([W], [row_offsets], [columns], [values], [agreed]))
        tuned.append(W.clone())
    for near_one, far_one in zip(tuned[:3], tuned[3:], strict=True):
        assert torch.equal(near_one, far_one)
    assert not torch.equal(tuned[0], tuned[1])
    assert not torch.equal(tuned[1], tuned[2])


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0)], ids=str)
def test_expanded_inputs(isa: str, strides: tuple[int, int]) -> None:
    W, a = torch.randn(600).as_strided((40, 500), strides), torch.rand(1, 500)
    acc, expected = torch.zeros(500, dtype=torch.float64), torch.zeros(500, dtype=torch.float64)
    native.column_norm_(W, acc, 1.0)
    reference.column_norm_(W, expected, 1.0)
    torch.testing.assert_close(acc, expected, rtol=1e-5, atol=0)
    assert torch.equal(native.score_topk(W, a, 7), reference.score_topk(W, a, 7))
    for found, wanted in zip(native.score_kth([W], [a], 99), reference.score_kth([W], [a], 99), strict=True):
        assert torch.equal(found, wanted)
