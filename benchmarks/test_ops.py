"""Each op on each CPU backend beside plain torch, by pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

For one's own work on a kernel: ``--benchmark-autosave`` before a change, ``--benchmark-compare`` after it. Contestants run
one after the other here, so that a ratio between them is as noisy as the machine; those that are published come from
``benchmarks.kernels``, in which they alternate. Sizes are of ViT-S and ResNet, float32, one thread unless
``OMP_NUM_THREADS`` is set. Every result is checked once before it is timed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.shared import contestants
from benchmarks.shared.shapes import block, entries
from fps_kernels import ops
from fps_kernels.ops.reference import entry_rows

WIDTH = 384
TOKENS = 4 * 197  # of a batch of 4
LINE = 64  # bytes: the least that memory moves for a scattered entry
LR = 1e-4


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        size: what it works on, in words.
        op: calls the op.
        plain: calls what torch has instead.
        check: raises where the results of one call each differ.
        nbytes: the least that the op has to move.
    """

    size: str
    op: Callable[[], Any]
    plain: Callable[[], Any]
    check: Callable[[Any, Any], None]
    nbytes: int


def same_sums(found: Tensor, expected: Tensor) -> None:
    """Up to the order of summation; measured by the largest sum, as terms may cancel."""
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def equal(found: Tensor, expected: Tensor) -> None:
    """Every bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_dtype=False)


def weights_and_factors() -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(shape) * 0.02 for shape in block(WIDTH)]
    return weights, [torch.rand(W.shape[1]) + 0.1 for W in weights]


# ------------------------------------------------------------------------------------------------ statistics


def column_norm() -> Case:
    x, acc = torch.randn(TOKENS, WIDTH), torch.zeros(WIDTH, dtype=torch.float64)

    def op() -> Tensor:
        ops.column_norm_(x, acc, 1.0)
        return acc

    return Case(f"[{TOKENS}, {WIDTH}]", op, lambda: contestants.column_norm(x), same_sums, x.nbytes)


def convolution(shape: tuple[int, int, int, int], size: int, stride: int, padding: int) -> Case:
    x, acc = torch.randn(shape), torch.zeros(1, shape[1] * size * size, dtype=torch.float64)

    def op() -> Tensor:
        ops.column_norm_conv2d_(x, acc, [size] * 2, [stride] * 2, [padding] * 4, [1, 1], 1, 1.0)
        return acc[0]

    def plain() -> Tensor:
        return contestants.column_norm_conv2d(x, size, stride, padding)

    return Case(f"{size}x{size} on {list(shape)}", op, plain, same_sums, x.nbytes)


# ------------------------------------------------------------------------------------------------ choosing


def topk(k: int = 8) -> Case:
    weights, factors = weights_and_factors()
    pairs = list(zip(weights, factors, strict=True))

    def check(found: list[Tensor], expected: list[Tensor]) -> None:
        for columns, order in zip(found, expected, strict=True):
            equal(columns, order.sort(1).values)

    return Case(
        f"a block of ViT-S, k={k}",
        lambda: [ops.score_topk(W, a, k) for W, a in pairs],
        lambda: [contestants.topk(W, a, k) for W, a in pairs],
        check,
        sum(W.nbytes for W in weights),
    )


def kth() -> Case:
    weights, factors = weights_and_factors()
    k = sum(W.numel() for W in weights) // 100

    def check(found: tuple[Tensor, Tensor, Tensor], expected: Tensor) -> None:
        threshold, greater, same = found
        equal(threshold, expected)
        assert int(greater.sum()) < k <= int(greater.sum() + same.sum())

    return Case(
        "a block of ViT-S, 1 %",
        lambda: ops.score_kth(weights, factors, k),
        lambda: contestants.kth(contestants.scores(weights, factors), k),
        check,
        sum(W.nbytes for W in weights),
    )


def counts() -> Case:
    weights, factors = weights_and_factors()
    thresholds = torch.rand(len(weights))

    def plain() -> Tensor:
        return torch.stack([(s > t).sum() for s, t in zip(contestants.scores(weights, factors), thresholds, strict=True)])

    return Case(
        "a block of ViT-S",
        lambda: ops.score_counts(weights, factors, thresholds),
        plain,
        lambda found, expected: equal(found[0], expected),
        sum(W.nbytes for W in weights),
    )


def select() -> Case:
    weights, factors = weights_and_factors()
    scores = contestants.scores(weights, factors)
    threshold = contestants.kth(scores, sum(W.numel() for W in weights) // 100)
    counts = [int((s >= threshold).sum()) for s in scores]

    def op() -> list[contestants.Csr]:
        return [ops.score_select(W, a, threshold, nnz) for W, a, nnz in zip(weights, factors, counts, strict=True)]

    def check(found: list[contestants.Csr], expected: list[tuple[Tensor, ...]]) -> None:
        for (row_offsets, columns), (rows, expected_columns) in zip(found, expected, strict=True):
            equal(entry_rows(row_offsets), rows)
            equal(columns, expected_columns)

    return Case(
        "a block of ViT-S, 1 %",
        op,
        lambda: contestants.at_least(contestants.scores(weights, factors), threshold),
        check,
        sum(W.nbytes for W in weights) + 4 * sum(counts),
    )


# ------------------------------------------------------------------------------------------------ training


def gradient(k: int = 4) -> Case:
    gy, x = torch.randn(TOKENS, 4 * WIDTH), torch.randn(TOKENS, WIDTH)
    row_offsets, columns = entries(k, 4 * WIDTH, WIDTH)
    return Case(
        f"fc1 of ViT-S, {TOKENS} tokens, k={k}",
        lambda: ops.sampled_grad(gy, x, row_offsets, columns),
        lambda: contestants.dense_gradient(gy, x),
        lambda found, dense: same_sums(found, dense[entry_rows(row_offsets), columns.long()]),
        gy.nbytes + x.nbytes + 8 * columns.numel(),
    )


def sparse_delta(k: int = 4) -> Case:
    x, y = torch.randn(TOKENS, WIDTH), torch.zeros(TOKENS, 4 * WIDTH)
    row_offsets, columns = entries(k, 4 * WIDTH, WIDTH)
    values = torch.randn(columns.numel())
    delta = torch.zeros(4 * WIDTH, WIDTH)
    delta[entry_rows(row_offsets), columns.long()] = values

    def op() -> Tensor:
        ops.sparse_delta_matmul_(y.zero_(), x, row_offsets, columns, values)
        return y

    return Case(f"fc1 of ViT-S, {TOKENS} tokens, k={k}", op, lambda: x @ delta.t(), same_sums, 2 * y.nbytes + x.nbytes)


def gradient_of_convolution(k: int = 4) -> Case:
    x, gy = (torch.randn(4, 64, 56, 56) for _ in range(2))
    row_offsets, columns = entries(k, 64, 64 * 3 * 3)
    return Case(
        f"3x3 on {list(x.shape)}, k={k}",
        lambda: ops.sampled_grad_conv2d(gy, x, row_offsets, columns, [3, 3], [1, 1], [1] * 4, [1, 1], 1),
        lambda: nn.grad.conv2d_weight(x, (64, 64, 3, 3), gy, padding=1).flatten(1),
        lambda found, dense: same_sums(found, dense[entry_rows(row_offsets), columns.long()]),
        gy.nbytes + x.nbytes + 8 * columns.numel(),
    )


def scatter(k: int = 8) -> Case:
    W = torch.randn(4 * WIDTH, WIDTH)
    copy = W.clone()
    row_offsets, columns = entries(k, *W.shape)
    where, values = (entry_rows(row_offsets), columns.long()), torch.randn(columns.numel())

    def op() -> Tensor:
        ops.scatter_values_(W, row_offsets, columns, values)
        return W

    return Case(
        f"fc1 of ViT-S, k={k}", op, lambda: copy.index_put_(where, values), equal, columns.numel() * (2 * LINE + 4 + 4)
    )


def adamw(k: int = 8) -> Case:
    weights, _ = weights_and_factors()
    grads = [torch.randn_like(W) for W in weights]
    choices = [entries(k, *W.shape) for W in weights]
    step = contestants.masked_step(weights, grads, choices, LR, weight_decay=0.01)
    copies = [nn.Parameter(W.clone()) for W in weights]
    for p, grad in zip(copies, grads, strict=True):
        p.grad = grad
    dense = torch.optim.AdamW(copies, lr=LR, weight_decay=0.01, fused=True)

    def check(_: None, __: None) -> None:
        for W, p, (row_offsets, columns) in zip(weights, copies, choices, strict=True):
            where = entry_rows(row_offsets), columns.long()
            torch.testing.assert_close(W[where], p.detach()[where], rtol=10 * 2**-23, atol=2e-6 * LR)

    nnz = sum(columns.numel() for _, columns in choices)
    return Case(f"a block of ViT-S, k={k}", step, dense.step, check, nnz * contestants.BYTES_PER_STEPPED_ENTRY)


def agreement(k: int = 8) -> Case:
    """Where nothing has changed, as in most forward passes; plain torch only looks whether that is so."""
    weights, _ = weights_and_factors()
    choices = [entries(k, *W.shape) for W in weights]
    places = [(entry_rows(row_offsets), columns.long()) for row_offsets, columns in choices]
    values = [W[place] for W, place in zip(weights, places, strict=True)]
    agreed = [v.clone() for v in values]
    arguments = weights, [r for r, _ in choices], [c for _, c in choices], values, agreed

    def plain() -> bool:
        tensors = zip(weights, places, values, agreed, strict=True)
        return all(torch.equal(v, a) and torch.equal(W[place], a) for W, place, v, a in tensors)

    def check(_: None, same: bool) -> None:
        assert same

    nnz = sum(v.numel() for v in values)
    return Case(f"a block of ViT-S, k={k}", lambda: ops.agree_values_(*arguments), plain, check, nnz * (LINE + 12))


def coarse(x: Tensor) -> tuple[Tensor, float, float]:
    """``x`` in 8 bits, its minimum and the step."""
    low, high = (float(v) for v in x.aminmax())
    step = (high - low) / 255
    return x.sub(low).div_(step).round_().to(torch.uint8), low, step


def packing() -> Case:
    """Beside it 8 bits with one minimum and step for the whole tensor, in torch's operations."""
    x = torch.randn(TOKENS, 4 * WIDTH)

    def plain() -> Tensor:
        return coarse(x)[0]

    def check(packed: tuple[Tensor, Tensor], codes: Tensor) -> None:
        with ops.use_backend("reference"):
            expected = ops.pack_groups(x, 8)
        equal(packed[0], expected[0])
        assert codes.shape == x.shape

    return Case("GELU's input of ViT-S, 8 bits", lambda: ops.pack_groups(x, 8), plain, check, packed_bytes(x))


def unpacking() -> Case:
    x = torch.randn(TOKENS, 4 * WIDTH)
    packed = ops.pack_groups(x, 8)
    codes, low, step = coarse(x)

    def plain() -> Tensor:
        return codes.to(x.dtype).mul_(step).add_(low)

    def check(found: Tensor, coarser: Tensor) -> None:
        assert float((found - x).abs().max()) < 0.03
        assert float((found - coarser).abs().max()) < 2 * step

    return Case(
        "GELU's input of ViT-S, 8 bits",
        lambda: ops.unpack_groups(*packed, x.shape, x.stride(), x.dtype, 8),
        plain,
        check,
        packed_bytes(x),
    )


def packed_bytes(x: Tensor) -> int:
    """Of the numbers, their codes and scales."""
    return x.nbytes + x.numel() + x.numel() // 8


CASES: dict[str, Callable[[], Case]] = {
    "column_norm_": column_norm,
    "column_norm_conv2d_-patches": lambda: convolution((4, 3, 224, 224), 16, 16, 0),
    "column_norm_conv2d_-3x3": lambda: convolution((2, 64, 56, 56), 3, 1, 1),
    "score_topk": topk,
    "score_kth": kth,
    "score_counts": counts,
    "score_select": select,
    "sampled_grad": gradient,
    "sampled_grad_conv2d": gradient_of_convolution,
    "sparse_delta_matmul_": sparse_delta,
    "scatter_values_": scatter,
    "masked_adamw_": adamw,
    "agree_values_": agreement,
    "pack_groups": packing,
    "unpack_groups": unpacking,
}


@pytest.mark.benchmark(max_time=0.3, min_rounds=3)  # seconds, rounds: a minute in all on two cores
@pytest.mark.parametrize("contestant", ["native", "reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: BenchmarkFixture, name: str, contestant: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    benchmark.group = f"{name.partition('-')[0]}, {case.size}"
    benchmark.extra_info["GB moved"] = case.nbytes / 1e9
    with nullcontext() if contestant == "torch" else ops.use_backend(contestant):
        case.check(case.op(), case.plain())
        benchmark(case.plain if contestant == "torch" else case.op)
