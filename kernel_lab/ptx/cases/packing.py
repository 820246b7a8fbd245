"""``pack_groups`` and ``unpack_groups``."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fps_kernels.ops import reference
from fps_kernels.ops import triton as backend
from fps_kernels.ops.packing import along_memory, key_of
from kernel_lab.ptx.cases.case import BF16, DTYPES, FP16, FP32, Arguments, Case, randn, size


def pack_groups(x: Tensor, bits: int, key: int | None) -> Callable[[], object]:
    """A call whose scales are compared as bits: NaN is one of them."""
    return lambda: _in_bits(*backend.pack_groups(x, bits, key))


def reference_pack_groups(x: Tensor, bits: int, key: int | None) -> tuple[Tensor, Tensor]:
    return _in_bits(*reference.pack_groups(x, bits, key))


def _in_bits(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, scales.view(torch.int16)


def cases() -> Iterator[Case]:
    for number, dtype in enumerate(DTYPES):
        for place, (name, x) in enumerate(_inputs(dtype)):
            for bits in (8, 4):
                for seed in (None, 3, -9):
                    lane = (place + number + bits // 4) % 3 == 0 and (seed is None) == (place % 2 == 0)
                    made = partial(_arguments, x, bits, seed)
                    how = "nearest" if seed is None else f"seed {seed}"
                    label = f"{name} in {bits} bits, {how}"
                    yield Case("pack_groups", label, dtype, made, _least_packed, _elements, lane=lane and seed != -9)
        for n in (1, 31, 33, 64, 2048, 5001):
            for bits in (8, 4):
                made = partial(_packed, n, bits, dtype)
                lane = n in (33, 5001) and (bits == 8) == (dtype == FP16)
                yield Case("unpack_groups", f"[{n}] of {bits} bits", dtype, made, _least_unpacked, _numbers, lane=lane)
        made = partial(_arguments, partial(_every_second, dtype), 4, 3)
        yield Case(
            "pack_groups",
            "every second of [50, 67] in 4 bits, seed 3, positions of 64 bits",
            dtype,
            made,
            _least_packed,
            _elements,
            forced={"packing.INT32_END": 0},
        )
    for dtype in (BF16, FP32):
        for bits in (8, 4):
            made = partial(_arguments, partial(randn, 197, 3072, dtype=dtype), bits, None)
            yield Case(
                "pack_groups", f"fc1's output [197, 3072] in {bits} bits", dtype, made, _least_packed, _elements, large=True
            )
            made = partial(_packed, 197 * 3072, bits, dtype)
            yield Case("unpack_groups", f"[197, 3072] of {bits} bits", dtype, made, _least_unpacked, _numbers, large=True)
        # Whose end may be anywhere: nothing is read or written by 16 bytes.
        made = partial(_arguments, partial(randn, 500_001, dtype=dtype), 8, None)
        yield Case("pack_groups", "[500001] in 8 bits", dtype, made, _least_packed, _elements, large=True)
        made = partial(_packed, 500_001, 8, dtype)
        yield Case("unpack_groups", "[500001] of 8 bits", dtype, made, _least_unpacked, _numbers, large=True)
        made = partial(_arguments, partial(_query, dtype), 8, None)
        yield Case("pack_groups", "a query [12, 788, 64] in 8 bits", dtype, made, _least_packed, _elements, large=True)


def _inputs(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def unusual() -> Tensor:
        x = randn(400, dtype=dtype)
        x[3], x[40], x[70], x[130:160], x[200:230] = float("nan"), float("inf"), -float("inf"), 0.0, -0.0
        x[300], x[301] = torch.finfo(dtype).max, -torch.finfo(dtype).max
        return x

    for n in (1, 33, 64, 2048, 5001):
        yield f"[{n}]", partial(randn, n, dtype=dtype)
    yield "unusual numbers", unusual
    yield "every second of [50, 67]", partial(_every_second, dtype)
    yield "rows of [37, 160]", lambda: randn(37, 160, dtype=dtype)[:, 32:128]
    yield "[3, 5, 6, 7] of [4, 6, 8, 9]", lambda: randn(4, 6, 8, 9, dtype=dtype)[:3, :5, :6, :7]
    yield "one element after an address of 16 bytes", lambda: randn(3001, dtype=dtype)[1:]


def _every_second(dtype: torch.dtype) -> Tensor:
    return randn(50, 67, dtype=dtype)[:, ::2]


def _query(dtype: torch.dtype) -> Tensor:
    """Of the output of one projection for queries, keys and values: rows further apart than they are long."""
    return randn(1, 788, 3, 12, 64, dtype=dtype).permute(2, 0, 3, 1, 4)[0]


def _arguments(x: Callable[[], Tensor], bits: int, seed: int | None) -> Arguments:
    return along_memory(x()), bits, None if seed is None else key_of(seed)


def _packed(n: int, bits: int, dtype: torch.dtype) -> Arguments:
    x = randn(n, dtype=dtype)
    x[0] = float("nan") if n == 5001 else x[0]
    return *reference.pack_groups(x, bits, None), torch.empty(n, dtype=dtype), bits


def _scales(n: int) -> int:
    return -(-n // 32) * 4


def _least_packed(arguments: Arguments) -> int:
    x: Tensor = arguments[0]
    bits: int = arguments[1]
    return size(x) + -(-x.numel() * bits // 8) + _scales(x.numel())


def _least_unpacked(arguments: Arguments) -> int:
    codes, scales, out, _ = arguments
    return size(codes, scales, out)


def _elements(arguments: Arguments) -> int:
    x: Tensor = arguments[0]
    return x.numel()


def _numbers(arguments: Arguments) -> int:
    out: Tensor = arguments[2]
    return out.numel()
