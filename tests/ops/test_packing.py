"""``pack_groups`` and ``unpack_groups``: the same bits on every backend, and numbers come back half a step off at most."""

import pytest
import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference
from fps_kernels.ops.packing import along_memory, key_of

SIZES = [1, 2, 31, 32, 33, 511, 512, 513, 1000, 4097]
SEEDS = [None, 0, 5, -7, 2**40 + 3]
BITS = pytest.mark.parametrize("bits", [8, 4])


def back(packed: tuple[Tensor, Tensor], like: Tensor, bits: int) -> Tensor:
    return ops.unpack_groups(*packed, like.shape, like.stride(), like.dtype, bits)


def assert_as_defined(x: Tensor, bits: int, seed: int | None) -> Tensor:
    """The backend's bits are the reference's, in both directions."""
    packed = ops.pack_groups(x, bits, seed)
    if not x.numel():
        return back(packed, x, bits)
    expected = reference.pack_groups(along_memory(x), bits, None if seed is None else key_of(seed))
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[1].view(torch.int16), expected[1].view(torch.int16))
    found = back(packed, x, bits)
    memory = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    reference.unpack_groups(*expected, memory, bits)
    torch.testing.assert_close(along_memory(found).reshape(-1), memory, rtol=0, atol=0, equal_nan=True)
    return found


def steps_of(x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    """The step of every number's group, float64, in the order of memory."""
    return packed[1][:, 1].double().repeat_interleave(32)[: x.numel()]


@BITS
@pytest.mark.parametrize("size", SIZES)
def test_every_backend_keeps_the_same_bits(backend, device, dtype, bits, size):
    x = (torch.randn(size, device=device) * torch.rand(size, device=device) + 0.3).to(dtype)
    for seed in SEEDS:
        assert_as_defined(x, bits, seed)


def layouts(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    base = torch.randn(3, 6, 8, 20, device=device).to(dtype)
    return {
        "scalar": base[0, 0, 0, 0],
        "empty": base[:, :0],
        "transposed": base.transpose(1, 3),
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "heads of one projection": base.view(3, 6, 8, 2, 10).permute(3, 0, 2, 1, 4)[1],
        "rows of whole groups": torch.randn(5, 96, device=device).to(dtype)[:, 32:],
        "every second": base[..., ::2],
        "every second of every dimension": base[::2, ::2, ::2, ::2],
        "expanded": base[:1, :, :1].expand(3, 6, 8, 20),
        "one number in a dimension": base[:, :1, :, :1],
        "unaligned": base.view(-1)[1:-2],
        "five dimensions that do not merge": torch.randn(4, 3, 4, 3, 4, device=device).to(dtype)[::2, ::2, ::2, ::2, ::2],
    }


@BITS
@pytest.mark.parametrize("name", list(layouts(torch.float32, torch.device("cpu"))))
def test_groups_go_along_memory_whatever_the_strides(backend, device, dtype, bits, name):
    x = layouts(dtype, device)[name]
    found = assert_as_defined(x, bits, None)
    assert_as_defined(x, bits, 11)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    if name not in ("expanded", "empty"):
        # The order of the dimensions in memory is that of the original, without gaps.
        dense = torch.empty_like(x)
        used = [d for d in range(x.dim()) if x.shape[d] > 1]
        assert [found.stride(d) for d in used] == [dense.stride(d) for d in used]


def bound(x: Tensor, packed: tuple[Tensor, Tensor], stochastic: bool) -> Tensor:
    """How far a number may be off: half a step or one, the roundings of the sum, and of the dtype that it comes back in."""
    numbers = along_memory(x).reshape(-1).double().abs()
    return steps_of(x, packed) * (1.0 if stochastic else 0.5) * (1 + 1e-4) + numbers * torch.finfo(x.dtype).eps + 1e-37


@BITS
@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_is_off_by_more_than_half_a_step(backend, device, dtype, bits, seed):
    x = (torch.randn(4000, device=device) * torch.rand(4000, device=device).mul(8).exp()).to(dtype)
    packed = ops.pack_groups(x, bits, seed)
    off = (back(packed, x, bits).double() - x.double()).abs()
    assert bool((off <= bound(x, packed, seed is not None)).all())
    # A step is what the range of its group asks for, rounded up to eight bits of mantissa.
    groups = x[: 4000 // 32 * 32].double().view(-1, 32)
    spread = groups.amax(1) - packed[1][: len(groups), 0].double()
    asked = spread / (2**bits - 1)
    steps = packed[1][: len(groups), 1].double()
    assert bool((steps >= asked * (1 - 1e-6)).all())
    assert bool((steps <= asked * (1 + 2**-7) * (1 + 1e-6)).all())


@BITS
def test_a_group_that_is_not_finite_comes_back_as_nan_and_its_neighbours_as_ever(backend, device, dtype, bits):
    x = torch.randn(7 * 32, device=device).to(dtype)
    x[40], x[70], x[100] = float("nan"), float("inf"), -float("inf")
    found = assert_as_defined(x, bits, None).view(7, 32)
    assert found.isnan().all(1).tolist() == [False, True, True, True, False, False, False]
    assert not found[[0, 4, 5, 6]].isnan().any()
    assert_as_defined(x, bits, 2)


@BITS
def test_a_range_beyond_float32_comes_back_as_nan(backend, device, bits):
    x = torch.ones(64, device=device)
    x[3], x[4] = 3e38, -3e38
    found = assert_as_defined(x, bits, None)
    assert found.isnan().tolist() == [True] * 32 + [False] * 32


@BITS
@pytest.mark.parametrize(
    "numbers",
    [
        [1e-42, -1e-42, 0.0, 3e-45],
        [0.0, -0.0, 0.0],
        [-0.0, -0.0],
        [3.1, 3.1, 3.1],
        [-7.7],
        [65504.0, 0.0, 1.0],
        [-65504.0, 65504.0, 3.0],
        [1e-30, 1.0],
    ],
    ids=str,
)
def test_extremes_stay_finite(backend, device, dtype, bits, numbers):
    x = torch.tensor(numbers, device=device).to(dtype)
    packed = ops.pack_groups(x, bits)
    found = assert_as_defined(x, bits, None)
    assert bool(found.isfinite().all())
    assert bool(((found.double() - x.double()).abs() <= bound(x, packed, False)).all())
    assert_as_defined(x, bits, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_numbers_of_a_dtype_stay_finite(backend, device, dtype):
    x = torch.full((40,), torch.finfo(dtype).max, device=device, dtype=dtype)
    assert torch.equal(assert_as_defined(x, 8, None), x) or dtype == torch.float32
    assert bool(assert_as_defined(x, 8, None).isfinite().all())


def test_stochastic_rounding_is_right_in_the_mean(backend, device):
    x = torch.rand(256, device=device)
    packed = [ops.pack_groups(x, 4, seed) for seed in range(400)]
    mean = sum(back(one, x, 4) for one in packed) / len(packed)
    step = steps_of(x, packed[0])
    error = (mean.double() - x.double()) / step
    assert float(error.abs().max()) < 5 * 0.5 / 20  # a standard error of at most half a step over the root of 400
    assert abs(float(error.mean())) < 5 * 0.5 / 20 / 16
    assert not torch.equal(packed[0][0], packed[1][0])
    assert torch.equal(packed[7][0], ops.pack_groups(x, 4, 7)[0])


@BITS
def test_zeros_stay_zeros_behind_a_relu(backend, device, bits):
    x = torch.randn(320, device=device).relu()
    assert bool((assert_as_defined(x, bits, None)[x == 0] == 0).all())


def test_the_number_of_threads_does_not_matter(backend, device):
    x = torch.randn(300_000 if backend != "triton" else 3000, device=device)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed = ops.pack_groups(x, 8, 3)
            found.append((*packed, back(packed, x, 8)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_refused():
    x = torch.randn(40)
    codes, scales = ops.pack_groups(x, 8)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.float64"):
        ops.pack_groups(x.double(), 8)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        ops.pack_groups(x, 2)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 16"):
        ops.unpack_groups(codes, scales, [40], [1], torch.float32, 16)
    with pytest.raises(ValueError, match="codes must have shape"):
        ops.unpack_groups(codes, scales, [41], [1], torch.float32, 8)
    with pytest.raises(ValueError, match="codes must have shape"):
        ops.unpack_groups(codes, scales, [40], [1], torch.float32, 4)
    with pytest.raises(ValueError, match="scales must have shape"):
        ops.unpack_groups(codes, scales[:1], [40], [1], torch.float32, 8)
    with pytest.raises(ValueError, match="strides must have one number for each dimension"):
        ops.unpack_groups(codes, scales, [40], [40, 1], torch.float32, 8)
    with pytest.raises(TypeError, match="dtype must be"):
        ops.unpack_groups(codes, scales, [40], [1], torch.float64, 8)
    with pytest.raises(TypeError, match="codes must be torch.uint8"):
        ops.unpack_groups(codes.int(), scales, [40], [1], torch.float32, 8)
    with pytest.raises(TypeError, match="scales must be torch.bfloat16"):
        ops.unpack_groups(codes, scales.float(), [40], [1], torch.float32, 8)
    with pytest.raises(ValueError, match="scales must be contiguous"):
        ops.unpack_groups(codes, scales.t().contiguous().t(), [40], [1], torch.float32, 8)


@BITS
def test_registration(backend, device, bits):
    for x in (torch.randn(3, 21, device=device), torch.randn(4, 9, device=device).t(), torch.randn(0, device=device)):
        torch.library.opcheck(torch.ops.fps_kernels.pack_groups.default, (x, bits, None))
        codes, scales = ops.pack_groups(x, bits)
        arguments = (codes, scales, list(x.shape), list(x.stride()), torch.bfloat16, bits)
        torch.library.opcheck(torch.ops.fps_kernels.unpack_groups.default, arguments)
