"""Numbers kept in 8 or 4 bits, in groups along memory: registration and checks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import FLOAT_DTYPES, check_device, check_dtype, check_float, check_shape
from fps_kernels.ops._dispatch import implementation
from fps_kernels.ops.reference import mixed

GROUP = 32  # numbers that share a minimum and a step
BITS = (8, 4)
MOST_DIMENSIONS = 4  # of what a backend is given


@custom_op("fps_kernels::pack_groups", mutates_args=())
def pack_groups(x: Tensor, bits: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Keep every number of ``x`` as a code of a few bits, with a minimum and a step for each 32 of them along memory.

    A number is ``minimum + code * step`` afterwards, at most half a step off where it is rounded to nearest. The minimum is
    rounded down and the step up to bfloat16, so that both ends of a group stay in reach: a step is
    ``(largest - minimum) / (2**bits - 1)`` and up to 2^-7 of that more. A group in which a number is NaN or infinite, or
    whose range is more than float32 holds, comes back as NaN, whole.

    Rounding is ``floor((x - minimum) * fl32(1 / step) + u)`` in float32, with ``u = 0.5`` or, where a seed is given, drawn
    from ``[0, 1)`` by a hash of the seed and the position: the mean over seeds is then ``x`` itself. Every backend gives the
    same bits.

    Args:
        x: float32, bfloat16 or float16, of any shape and strides. Groups go along its memory, not its dimensions.
        bits: 8 or 4 for each number.
        seed: of stochastic rounding; ``None`` rounds to nearest.

    Returns:
        ``codes``, uint8 ``[n * bits / 8]``, rounded up, the first of two 4-bit codes in the lower half, and ``scales``,
        bfloat16 ``[ceil(n / 32), 2]``: minimum and step of each group.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong number of bits.

    Example:
        >>> codes, scales = torch.ops.fps_kernels.pack_groups(x, 8)
        >>> torch.ops.fps_kernels.unpack_groups(codes, scales, x.shape, x.stride(), x.dtype, 8)
    """
    check_float("x", x)
    check_bits(bits)
    if x.numel() == 0:
        return empty_packed(x, bits)
    packed: tuple[Tensor, Tensor] = implementation("pack_groups", x.device).pack_groups(
        along_memory(x), bits, None if seed is None else key_of(seed)
    )
    return packed


@pack_groups.register_fake
def _(x: Tensor, bits: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    return empty_packed(x, bits)


@custom_op("fps_kernels::unpack_groups", mutates_args=())
def unpack_groups(
    codes: Tensor, scales: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, bits: int
) -> Tensor:
    """What :func:`pack_groups` kept.

    Args:
        codes: of :func:`pack_groups`.
        scales: of :func:`pack_groups`.
        shape: of what was packed.
        strides: of what was packed.
        dtype: float32, bfloat16 or float16: values are computed in float32 and rounded to it, finite ones to a finite one.
        bits: as it was packed.

    Returns:
        A tensor of this shape and dtype, whose memory is dense and has the order of ``strides``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or number of bits.
    """
    check_bits(bits)
    check_dtype("codes", codes, torch.uint8)
    check_dtype("scales", scales, torch.bfloat16)
    check_device("scales", scales, codes.device)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    if len(shape) != len(strides):
        raise ValueError(f"strides must have one number for each dimension of shape {list(shape)}, got {list(strides)}")
    out = _dense(codes, shape, strides, dtype)
    check_shape("codes", codes, (_bytes(out.numel(), bits),))
    check_shape("scales", scales, (-(-out.numel() // GROUP), 2))
    for name, tensor in (("codes", codes), ("scales", scales)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if out.numel():
        memory = out.as_strided((out.numel(),), (1,))
        implementation("unpack_groups", codes.device).unpack_groups(codes, scales, memory, bits)
    return out


@unpack_groups.register_fake
def _(codes: Tensor, scales: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, bits: int) -> Tensor:
    return _dense(codes, shape, strides, dtype)


def key_of(seed: int) -> int:
    """The 64 bits of a seed as 32, so that the streams of neighbouring seeds have nothing in common."""
    return mixed(mixed(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF))


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4, got {bits}")


def _bytes(numbers: int, bits: int) -> int:
    return numbers if bits == 8 else -(-numbers // 2)


def empty_packed(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Memory for the codes and scales of ``x``, beside it."""
    n = x.numel()
    codes = torch.empty(_bytes(n, bits), dtype=torch.uint8, device=x.device)
    return codes, torch.empty(-(-n // GROUP), 2, dtype=torch.bfloat16, device=x.device)


def _order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions of more than one number, those first whose steps in memory are longest; equal ones in their order."""
    return sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: (-strides[d], d))


def _dense(like: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    dense, step = [0] * len(shape), 1
    for d in reversed(_order(shape, strides)):
        dense[d] = step
        step *= shape[d]
    for d in range(len(shape)):  # of one number: any stride will do, and what torch computes itself is as good as any
        if shape[d] == 1:
            dense[d] = dense[d + 1] * shape[d + 1] if d + 1 < len(shape) else 1
    return torch.empty_strided(list(shape), dense, dtype=dtype, device=like.device)


def along_memory(x: Tensor) -> Tensor:
    """``x`` with its dimensions in the order of memory, those merged that lie one behind the other: of most tensors one.

    Of more than :data:`MOST_DIMENSIONS` that do not merge a copy is made.
    """
    shape, strides, order = x.shape, x.stride(), _order(x.shape, x.stride())
    sizes: list[int] = []
    steps: list[int] = []
    for d in order:
        if sizes and steps[-1] == strides[d] * shape[d]:
            sizes[-1], steps[-1] = sizes[-1] * shape[d], strides[d]
        else:
            sizes.append(shape[d])
            steps.append(strides[d])
    if not sizes:
        return x.as_strided((1,), (1,))
    merged = x.as_strided(sizes, steps)
    return merged.reshape(-1) if len(sizes) > MOST_DIMENSIONS else merged
