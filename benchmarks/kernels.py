"""Each CPU op against its torch counterpart, alternating in one run: ``python -m benchmarks.kernels [--quick]``.

Machines are noisy, so that only ratios within a run mean something: every round runs each contestant once, and a ratio is
the median over rounds of the ratio within a round. Beside each figure stand the bytes that have to move, and how much of
this machine's copy bandwidth (``torch.Tensor.copy_``, measured in the same run) that is.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.shared import contestants
from benchmarks.shared.measuring import alternate, machine, ratio, save, table
from benchmarks.shared.shapes import VIT_B
from fps_kernels import ops
from fps_kernels.ops import native, native_packing


@dataclass
class Row:
    """One line of the table. ``ratio`` is ``ms / against_ms`` where the target is a bound on ours over theirs."""

    op: str
    ms: float
    against: str
    against_ms: float
    ratio: float
    target: str
    met: bool | None
    gbytes: float
    of_copy_bandwidth: float


class Report:
    """Collects rows; knows the copy bandwidth of the machine."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[Row] = []
        source = torch.randn(64 * 2**20)
        target = torch.empty_like(source)
        seconds = statistics.median(alternate({"copy": lambda: target.copy_(source)}, 15)["copy"]) / 1e3
        self.copy_gbytes_per_s = 2 * source.nbytes / seconds / 1e9

    def add(
        self,
        op: str,
        run: Callable[[], object],
        against: dict[str, Callable[[], object]],
        nbytes: int,
        at_most: dict[str, float] | None = None,
        at_least: dict[str, float] | None = None,
        rounds: int | None = None,
    ) -> None:
        for name, other in against.items():  # in pairs, so that a third does not decide what lies in the cache
            times = alternate({op: run, name: other}, rounds or self.rounds)
            found = ratio(times, op, name)
            target, met = "", None
            if at_most and name in at_most:
                target, met = f"≤ {at_most[name]:g}×", found <= at_most[name]
            if at_least and name in at_least:
                target, met = f"≥ {at_least[name]:g}× faster", 1 / found >= at_least[name]
            ms = statistics.median(times[op])
            bandwidth = nbytes / ms / 1e6 / self.copy_gbytes_per_s
            self.rows.append(Row(op, ms, name, statistics.median(times[name]), found, target, met, nbytes / 1e9, bandwidth))

    def table(self) -> str:
        head = ["op", "ms", "against", "ms", "ratio", "target", "", "GB", "of copy bandwidth"]
        body = [
            [
                row.op,
                f"{row.ms:.3g}",
                row.against,
                f"{row.against_ms:.3g}",
                f"{row.ratio:.2f}" if row.ratio > 0.5 else f"1/{1 / row.ratio:.1f}",
                row.target,
                {True: "met", False: "MISSED", None: ""}[row.met],
                f"{row.gbytes:.3f}",
                f"{row.of_copy_bandwidth:.0%}",
            ]
            for row in self.rows
        ]
        return table(head, body)


# ------------------------------------------------------------------------------------------------ what is measured


def column_norms(report: Report) -> None:
    for shape, dtype in (
        ((12608, 768), torch.float32),
        ((12608, 768), torch.bfloat16),
        ((3152, 768), torch.float32),
        ((197, 768), torch.float32),
    ):
        x, acc = torch.randn(shape).to(dtype), torch.zeros(shape[1], dtype=torch.float64)
        large = shape[0] == 12608 and dtype == torch.float32
        report.add(
            f"column_norm_ {list(shape)} {str(dtype).removeprefix('torch.')}",
            lambda x=x, acc=acc: ops.column_norm_(x, acc, 1.0),
            {"x.sum()": x.sum, "x.abs().sum(0)": lambda x=x: contestants.column_norm(x)},
            x.nbytes,
            at_most={"x.sum()": 1.4} if large else None,
            rounds=report.rounds * 5,
        )


def column_norms_conv2d(report: Report) -> None:
    for name, shape, size, stride, pad in (
        ("patch embedding", (16, 3, 224, 224), 16, 16, 0),
        ("3x3", (8, 64, 56, 56), 3, 1, 1),
        ("7x7 channels-last", (8, 192, 28, 28), 7, 1, 3),
    ):
        x = torch.randn(shape)
        if "last" in name:
            x = x.contiguous(memory_format=torch.channels_last)
        acc = torch.zeros(1, shape[1] * size * size, dtype=torch.float64)
        report.add(
            f"column_norm_conv2d_ {name} {list(shape)}",
            lambda x=x, acc=acc, k=size, s=stride, p=pad: ops.column_norm_conv2d_(
                x, acc, [k, k], [s, s], [p] * 4, [1, 1], 1, 1.0
            ),
            {
                "x.sum()": x.sum,
                "unfold().abs().sum()": lambda x=x, k=size, s=stride, p=pad: contestants.column_norm_conv2d(x, k, s, p),
            },
            x.nbytes,
            rounds=max(3, report.rounds // 2),
        )


def topk(report: Report, weights: list[Tensor], factors: list[Tensor]) -> None:
    pairs = list(zip(weights, factors, strict=True))
    for k in (1, 4, 8, 64, 384):
        report.add(
            f"score_topk k={k}",
            lambda k=k: [ops.score_topk(W, a, k) for W, a in pairs],
            {"one read: W.sum()": lambda: [W.sum() for W in weights]},
            sum(W.nbytes for W in weights),
            at_most={"one read: W.sum()": 3} if k == 8 else None,
        )
        if k in (1, 8, 64):
            report.add(
                f"score_topk k={k}",
                lambda k=k: [ops.score_topk(W, a, k) for W, a in pairs],
                {"(W.abs() * a).topk(k)": lambda k=k: [contestants.topk(W, a, k) for W, a in pairs]},
                sum(W.nbytes for W in weights),
                at_least={"(W.abs() * a).topk(k)": 15} if k == 8 else None,
                rounds=3,
            )
    transposed = [W.t().contiguous().t() for W in weights[:4]]
    report.add(
        "score_topk k=8, one block, transposed W",
        lambda: [ops.score_topk(W, a, 8) for W, a in zip(transposed, factors[:4], strict=True)],
        {"one read: W.sum()": lambda: [W.sum() for W in transposed]},
        sum(W.nbytes for W in transposed),
    )


def global_select(weights: list[Tensor], factors: list[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
    threshold, greater, equal = ops.score_kth(weights, factors, k)
    ties = k - int(greater.sum())
    chosen = []
    for W, a, above, same in zip(weights, factors, greater.tolist(), equal.tolist(), strict=True):
        here = min(ties, same)
        ties -= here
        chosen.append(ops.score_select(W, a, threshold, above + here))
    return chosen


def global_threshold(report: Report, weights: list[Tensor], factors: list[Tensor]) -> None:
    total, nbytes = sum(W.numel() for W in weights), sum(W.nbytes for W in weights)
    k = total // 100
    read = {"one read: W.sum()": lambda: [W.sum() for W in weights]}
    report.add("score_kth 1 %", lambda: ops.score_kth(weights, factors, k), read, nbytes)
    report.add(
        "score_kth + score_select 1 %",
        lambda: global_select(weights, factors, k),
        read,
        nbytes,
        at_most={"one read: W.sum()": 6},
    )


def torch_global(weights: list[Tensor], factors: list[Tensor], k: int) -> list[tuple[Tensor, ...]]:
    scores = contestants.scores(weights, factors)
    return contestants.at_least(scores, contestants.kth(scores, k))


def adamw(report: Report, weights: list[Tensor], factors: list[Tensor]) -> None:
    parameters = [torch.nn.Parameter(W) for W in weights]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    dense = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    random_factors = [torch.ones_like(a) for a in factors]
    noise = [torch.rand_like(W) for W in weights]
    choices = {
        "k=8 per row": [
            (torch.arange(W.shape[0] + 1, dtype=torch.int32) * 8, ops.score_topk(W, a, 8).flatten())
            for W, a in zip(weights, factors, strict=True)
        ],
        "random 1 %": global_select(noise, random_factors, sum(W.numel() for W in weights) // 100),
    }
    del noise
    for name, choice in choices.items():
        nnz = sum(columns.numel() for _, columns in choice)
        report.add(
            f"masked_adamw_ {name}",
            contestants.masked_step(weights, [p.grad for p in parameters], choice, lr=1e-4, weight_decay=0.01),
            {"torch.optim.AdamW(fused=True)": dense.step},
            nnz * contestants.BYTES_PER_STEPPED_ENTRY,
            at_least={"torch.optim.AdamW(fused=True)": 20},
        )


def sampled_gradients(report: Report) -> None:
    """Of two layers of ViT-B at batch 16, entries in the fifth of the columns that a pretrained network leaves at k=1."""
    for label, M, C, O in (("fc1", 3152, 768, 3072), ("fc2", 3152, 3072, 768)):
        gy, x = torch.randn(M, O), torch.randn(M, C)
        used = torch.randperm(C)[: C // 5]
        for k in (1, 4, 8, 16):
            columns = torch.stack([used[torch.randperm(len(used))[:k]].sort().values for _ in range(O)]).flatten().int()
            row_offsets = torch.arange(O + 1, dtype=torch.int32) * k
            report.add(
                f"sampled_grad ViT-B {label}, batch 16, k={k}",
                lambda gy=gy, x=x, csr=(row_offsets, columns): ops.sampled_grad(gy, x, *csr),
                {"gy.t() @ x": lambda gy=gy, x=x: contestants.dense_gradient(gy, x)},
                gy.nbytes + 4 * M * len(used),
            )


def packed_groups(report: Report) -> None:
    """Activations in 8 bits, more than any cache holds, beside a copy that reads and writes as many bytes together."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2**16, 4096).to(dtype)
        packed, out = ops.pack_groups(x, 8), torch.empty_like(x)
        nbytes = x.nbytes + sum(part.nbytes for part in packed)
        source = torch.zeros(nbytes // 2, dtype=torch.uint8)
        goal = torch.zeros_like(source)
        name, copy = f"[65536, 4096] {str(dtype).removeprefix('torch.')}, 8 bits", f"copy of {nbytes / 2e6:.0f} MB"
        numbers = x.view(-1)
        calls = {  # results are written to memory that is there, as a copy's is
            "pack_groups": lambda x=numbers, packed=packed: native_packing.pack_groups_into(x, 8, None, *packed),
            "unpack_groups": lambda packed=packed, out=out: native.unpack_groups(*packed, out.view(-1), 8),
        }
        for op, run in calls.items():
            report.add(f"{op} {name}", run, {copy: partial(goal.copy_, source)}, nbytes, at_most={copy: 1.3})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and two blocks of ViT-B instead of twelve")
    parser.add_argument("--only", help="measure only the groups whose name contains this")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads for both sides; by default torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    report = Report(rounds=5 if options.quick else 15)
    weights = [torch.randn(shape) * 0.02 for shape in (VIT_B[:8] if options.quick else VIT_B)]
    factors = [torch.rand(W.shape[1]) + 0.1 for W in weights]
    total = sum(W.numel() for W in weights)
    groups: dict[str, Callable[[], None]] = {
        "column_norm": lambda: column_norms(report),
        "conv2d": lambda: column_norms_conv2d(report),
        "topk": lambda: topk(report, weights, factors),
        "global": lambda: global_threshold(report, weights, factors),
        "global, torch": lambda: report.add(
            "score_kth + score_select 1 %",
            lambda: global_select(weights, factors, total // 100),
            {"torch.cat(scores).topk(k)": lambda: torch_global(weights, factors, total // 100)},
            4 * total,
            rounds=1,
        ),
        "adamw": lambda: adamw(report, weights, factors),
        "sampled_grad": lambda: sampled_gradients(report),
        "packed": lambda: packed_groups(report),
    }
    for name, measure in groups.items():
        if not options.only or options.only in name:
            measure()
    print(", ".join(f"{key} {value}" for key, value in machine().items()) + f", isa {native.isa()}")
    print(f"{len(weights)} weights of ViT-B, {total / 1e6:.0f} M entries; copy_ moves {report.copy_gbytes_per_s:.0f} GB/s\n")
    print(report.table())
    if not options.only:
        command = "python -m benchmarks.kernels" + (" --quick" if options.quick else "")
        command += f" --threads {options.threads}" if options.threads else ""
        rows = [asdict(row) for row in report.rows]
        save(
            "kernels_quick" if options.quick else "kernels",
            command,
            rows,
            isa=native.isa(),
            copy_gbytes_per_s=report.copy_gbytes_per_s,
        )


if __name__ == "__main__":
    main()
