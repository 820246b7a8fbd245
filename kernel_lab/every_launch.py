"""Compiles every kind of launch that the interpreted suite made, and random ones, for a GPU that need not be there.

    python -m kernel_lab.every_launch [FILE ...] [--random N] [--seed S] [--target sm_90]

``FILE`` is what :mod:`kernel_lab.noting` wrote. Random launches are those of ops called with matrices of odd strides,
unaligned addresses, sizes of 1 and of multiples of 16, and sizes and strides beyond 32 bits. Exits with 1 where one does not
compile, with what it was and what the compiler said.
"""

import argparse
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fps_kernels.ops import interpreted
from fps_kernels.ops import triton as backend
from fps_kernels.ops.packing import along_memory
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from fps_kernels.ops.triton.gradients import sampled_grad_with_bias
from kernel_lab import compilation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 7, 16, 33, 48, 64, 100, 256, 771, 1024, 3072)
LAYOUTS = ("rows", "transposed", "strided", "offset", "padded", "far", "repeated")
FAR = 2**31 + 16


def launch_of(line: str, target: str) -> compilation.Launch:
    """The launch of a note."""
    found = json.loads(line)
    kernel = getattr(importlib.import_module(found["module"]), found["kernel"])
    positional = tuple(_argument(value) for value in found["positional"])
    named = {name: _argument(value) for name, value in found["named"].items()}
    return compilation.specialised(target, kernel, (), positional, named)


def _argument(value: Any) -> Any:
    if isinstance(value, dict) and "pointer" in value:
        memory = torch.empty(2, dtype=getattr(torch, value["pointer"]), device="meta")
        return memory if value["aligned"] else memory[1:]
    return (
        getattr(tl, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[value["dtype"]])
        if isinstance(value, dict)
        else value
    )


def random_launches(seed: int, target: str) -> list[compilation.Launch]:
    """Those of one call of an op with random arguments."""
    draw = random.Random(seed)
    op, arguments = draw.choice(CALLS)(draw)
    return compilation.record(target, op, *arguments)


Call = tuple[Callable[..., object], tuple[Any, ...]]


def _matrix(draw: random.Random, O: int, C: int, dtype: torch.dtype | None = None) -> Tensor:
    dtype, layout = dtype or draw.choice(DTYPES), draw.choice(LAYOUTS)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if layout == "transposed":
        return meta(C, O).t()
    if layout == "strided":
        return meta(O, 3 * C)[:, ::3]
    if layout == "offset":
        return meta(O * C + 1)[1:].view(O, C)
    if layout == "padded":
        return meta(O, -(-C // 16) * 16 + 16)[:, :C]
    if layout == "far":
        return torch.empty_strided((O, C), (FAR, 1), dtype=dtype, device="meta")
    return meta(1, C).expand(O, C) if layout == "repeated" else meta(O, C)


def _vector(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="meta")


def _csr(draw: random.Random, O: int, C: int) -> tuple[Tensor, Tensor]:
    nnz = draw.choice([1, 16, O, min(O * C, 4 * O + 3)])
    return _vector(O + 1, torch.int32), _vector(nnz, torch.int32)


def _two_sizes(draw: random.Random) -> tuple[int, int]:
    return draw.choice(SIZES), draw.choice(SIZES)


def _convolution(draw: random.Random) -> tuple[Tensor, Convolution]:
    """Images ``[B, C, H, W]`` and a geometry that fits them."""
    kernel = draw.choice([1, 3, 7]), draw.choice([1, 2, 16])
    convolution = Convolution(
        kernel, (draw.choice([1, 2, 16]), 1), (draw.choice([0, 1]), 0, 1, 1), (1, draw.choice([1, 2])), 1
    )
    shape = draw.choice([1, 3, 16]), draw.choice([1, 3, 16, 64]), draw.choice([16, 33]), draw.choice([32, 57])
    images = torch.empty(shape, dtype=draw.choice(DTYPES), device="meta")
    if draw.random() < 0.3:
        images = images.to(memory_format=torch.channels_last)
    elif draw.random() < 0.3:
        images = torch.empty(shape[0], 2 * shape[1], *shape[2:], dtype=images.dtype, device="meta")[:, ::2]
    return images, convolution


def _norms(draw: random.Random) -> Call:
    M, C = draw.choice([*SIZES, FAR]), draw.choice(SIZES)
    return backend.column_norm_, (_matrix(draw, M, C), _vector(C, torch.float64), draw.choice([1.0, 2.0, float("inf")]))


def _conv_norms(draw: random.Random) -> Call:
    x, convolution = _convolution(draw)
    kh, kw = convolution.kernel_size
    acc = torch.empty(1, x.shape[1] * kh * kw, dtype=torch.float64, device="meta")
    return backend.column_norm_conv2d_, (x, acc, convolution, draw.choice([1.0, 2.0, float("inf")]))


def _scores(draw: random.Random) -> Call:
    C = draw.choice([*SIZES, 9001, 9216, 16384, 24576])
    groups = draw.choice([1, 3])
    O = groups * draw.choice(SIZES)
    W, a = _matrix(draw, O, C), torch.empty(groups, C, device="meta")
    way = draw.choice(["topk", "kth", "counts", "select"])
    if way == "topk":
        return backend.score_topk, (W, a, min(C, draw.choice([1, 2, 16, 17, 64])))
    if way in ("kth", "counts"):
        other = _matrix(draw, *_two_sizes(draw))
        lists = [W, other], [a, torch.empty(1, other.shape[1], device="meta")]
        if way == "counts":
            return backend.score_counts, (*lists, torch.empty(2, device="meta"))
        return backend.score_kth, (*lists, draw.choice([1, 16, 17]))
    return backend.score_select, (W, a, torch.empty((), device="meta"), draw.choice([1, 16, 33]))


def _gradients(draw: random.Random) -> Call:
    M, (O, C) = draw.choice([1, 16, 100, 3000, FAR]), _two_sizes(draw)
    dtype = draw.choice(DTYPES)
    gy, x = _matrix(draw, M, O, dtype), _matrix(draw, M, C, draw.choice([dtype, torch.float32]))
    return draw.choice([backend.sampled_grad, sampled_grad_with_bias]), (gy, x, *_csr(draw, O, C))


def _conv_gradients(draw: random.Random) -> Call:
    x, convolution = _convolution(draw)
    O = draw.choice([1, 8, 48])
    gy = torch.empty(x.shape[0], O, *convolution.output_size(x), dtype=x.dtype, device="meta")
    kh, kw = convolution.kernel_size
    return backend.sampled_grad_conv2d, (gy, x, *_csr(draw, O, x.shape[1] * kh * kw), convolution)


def _updates(draw: random.Random) -> Call:
    O, C = _two_sizes(draw)
    W = _matrix(draw, O, C)
    offsets, columns = _csr(draw, O, C)
    values = _vector(columns.numel(), torch.float32)
    way = draw.choice(["scatter", "agree", "adamw"])
    if way == "scatter":
        return backend.scatter_values_, (W, offsets, columns, values.to(draw.choice(DTYPES)))
    if way == "agree":
        return backend.agree_values_, (Agreement([W], [offsets], [columns], [values], [values]),)
    one = torch.empty((), device="meta")
    grad = draw.choice([values, _matrix(draw, O, C)])
    masters = values if W.dtype != torch.float32 else _vector(0, torch.float32)
    tensors = AdamWTensors(
        [W], [grad], [offsets], [columns], [masters], [values], [values], [one], [draw.choice([values, masters])]
    )
    scale = draw.choice([None, one])
    lrs = torch.empty(1, dtype=torch.float64, device="meta")
    flags = draw.random() < 0.5, scale, scale, draw.random() < 0.5
    return backend.masked_adamw_, (tensors, AdamWOptions(lrs, [0.01], 0.9, 0.999, 1e-8, *flags))


def _packing(draw: random.Random) -> Call:
    x = along_memory(_matrix(draw, *_two_sizes(draw)))
    bits, numbers = draw.choice([8, 4]), x.numel()
    if draw.random() < 0.5:
        return backend.pack_groups, (x, bits, draw.choice([None, 0, 1, 7, 2**32 - 1]))
    codes = _vector(-(-numbers * bits // 8), torch.uint8)
    scales = torch.empty(-(-numbers // 32), 2, dtype=torch.bfloat16, device="meta")
    return backend.unpack_groups, (codes, scales, _vector(numbers, x.dtype), bits)


def _deltas(draw: random.Random) -> Call:
    M, (O, C) = draw.choice([1, 16, 100, 3000, FAR]), _two_sizes(draw)
    offsets, columns = _csr(draw, O, C)
    values = _vector(columns.numel(), torch.float32)
    order = draw.choice([None, columns])
    return backend.sparse_delta_matmul_, (_matrix(draw, M, O), _matrix(draw, M, C), offsets, columns, values, order)


CALLS: list[Callable[[random.Random], Call]] = [
    _norms,
    _conv_norms,
    _scores,
    _scores,
    _gradients,
    _conv_gradients,
    _deltas,
    _updates,
    _packing,
]


def compile_all(jobs: Iterable[str | int], target: str) -> tuple[int, list[str]]:
    """How many different launches there were, and what is wrong. A job is the line of a note, or a seed."""
    done: set[compilation.Launch] = set()
    failures = []
    for job in jobs:
        launches = random_launches(job, target) if isinstance(job, int) else [launch_of(job, target)]
        for launch in launches:
            launch = compilation.without_grid(launch)
            if launch in done:
                continue
            done.add(launch)
            try:
                compilation.compiled(launch)
            except Exception as error:  # of any kind: it is what is looked for, and reported
                failures.append(f"{job}: {launch.name} {dict(launch.signature)} {dict(launch.constants)}: {error!r}")
    return len(done), failures


def _parts(jobs: list[str | int], count: int) -> Iterator[list[str | int]]:
    for number in range(count):
        yield jobs[number::count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what kernel_lab.noting wrote")
    parser.add_argument("--random", type=int, default=0, help="how many calls with random arguments")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--target", default="sm_90", choices=list(compilation.TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if interpreted():
        raise SystemExit("unset TRITON_INTERPRET: an interpreting process cannot compile")
    notes = sorted({line for file in arguments.files for line in file.read_text().splitlines()})
    jobs: list[str | int] = [*notes, *range(arguments.seed, arguments.seed + arguments.random)]
    count, failures = 0, []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for compiled, wrong in pool.map(
            compile_all, _parts(jobs, arguments.processes), [arguments.target] * arguments.processes
        ):
            count += compiled
            failures += wrong
    for failure in failures:
        print(failure)
    print(
        f"{len(notes)} noted and {arguments.random} random: {count} compiled for {arguments.target}, {len(failures)} failed"
    )
    sys.exit(1 if failures or not count else 0)


if __name__ == "__main__":
    main()
