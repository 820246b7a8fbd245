"""What the Triton kernels need of a GPU, read from machine code compiled ahead of time. Runs without a GPU; times nothing.

For every call in ``fps_kernels.ops.triton.cases`` and every target: registers, shared memory and occupancy of each kernel
it launches; and the least time in which the bytes it must move fit through the memory of an A100 and an H100. For
`sampled_grad` also whether it multiplies tiles or gathers, and at how many entries it changes its mind. Everything here is
calculated. Writes ``benchmarks/results/triton_report.json``.

    python -m benchmarks.triton_report
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from fps_kernels.ops import interpreted
from fps_kernels.ops.triton import gradients
from kernel_lab import cases, compilation

RESULTS = Path(__file__).parent / "results" / "triton_report.json"
# Vendors' figures: 80 GB SXM modules, bytes per second.
BANDWIDTH = {"A100": 2039e9, "H100": 3352e9}
NOTE = "calculated from machine code compiled ahead of time and from data-sheet bandwidth; nothing was run on a GPU"


@dataclass(frozen=True)
class Limits:
    """What one SM (on AMD: one compute unit) holds at a time.

    Attributes:
        threads: resident threads.
        programs: resident programs (thread blocks).
        registers: 32-bit registers.
        register_unit: registers are given to a warp in multiples of this many per thread.
        shared: bytes of shared memory.
        reserved: bytes of it that the system takes for each program.
    """

    threads: int
    programs: int
    registers: int
    register_unit: int
    shared: int
    reserved: int


LIMITS = {
    "sm_80": Limits(2048, 32, 65536, 8, 164 * 1024, 1024),
    "sm_90": Limits(2048, 32, 65536, 8, 228 * 1024, 1024),
    "sm_100": Limits(2048, 32, 65536, 8, 228 * 1024, 1024),
    # Four SIMDs with 512 registers for each of 64 lanes and at most 8 wavefronts.
    "gfx942": Limits(2048, 32, 4 * 512 * 64, 8, 64 * 1024, 0),
}


def occupancy(needs: compilation.Resources, limits: Limits) -> tuple[int, str]:
    """Resident programs per SM, and what limits them."""
    registers = math.ceil(max(1, needs.registers) / limits.register_unit) * limits.register_unit
    by = {
        "programs": limits.programs,
        "threads": limits.threads // needs.threads,
        "registers": limits.registers // (registers * needs.threads),
        "shared memory": limits.shared // max(1, needs.shared + limits.reserved),
    }
    limiting = min(by, key=lambda name: by[name])
    return by[limiting], limiting


def kernel_rows(case: cases.Case) -> list[dict[str, object]]:
    """One row for each kernel and target; a kernel's targets follow one another."""
    rows: list[tuple[int, dict[str, object]]] = []
    for target, limits in LIMITS.items():
        first: dict[compilation.Launch, int] = {}  # programs of the first of several equal launches
        for launch in compilation.record(target, case.op, *case.arguments):
            first.setdefault(replace(launch, grid=()), launch.programs)
        for position, (launch, programs) in enumerate(first.items()):
            needs = compilation.resources(launch)
            resident, limiting = occupancy(needs, limits)
            row: dict[str, object] = {
                "kernel": launch.name.lstrip("_"),
                "target": target,
                "programs": programs,
                "threads": needs.threads,
                "registers": needs.registers,
                "shared_bytes": needs.shared,
                "stack_bytes": needs.stack,
                "spilled": needs.spilled,
                "wide_loads": needs.wide_loads,
                "resident_programs_calculated": resident,
                "occupancy_calculated": round(resident * needs.threads / limits.threads, 3),
                "limited_by": limiting,
            }
            rows.append((position, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def sampled_grad_way(case: cases.Case) -> dict[str, object]:
    """Which way a call of ``sampled_grad`` takes, and from how many entries on it multiplies tiles; nothing for others."""
    if case.op is not gradients.sampled_grad:
        return {}
    gy, x, _, columns = case.arguments
    entries, least = columns.numel(), gradients.crossover(gy, x)
    return {
        "way": "tiles" if gradients.prefer_product(entries, gy, x) else "gathering",
        "entries": entries,
        "tiles_from_entries_calculated": math.ceil(least),
        "tiles_from_density_calculated": round(least / (gy.shape[1] * x.shape[1]), 5),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if interpreted():
        raise SystemExit("unset TRITON_INTERPRET: an interpreting process cannot compile")
    report = []
    print(f"triton {triton.__version__}, torch {torch.__version__}: {NOTE}\n")
    heads = ("target", 9), ("programs", 9), ("threads", 9), ("registers", 10), ("shared", 8), ("16 B loads", 11)
    print(f"{'kernel':24}" + "".join(f"{head:>{width}}" for head, width in heads) + "  occupancy (calculated)")
    for case in cases.cases():
        if case.bytes == 0:  # sizes that only the compile tests look at
            continue
        rows = kernel_rows(case)
        times = {name: case.bytes / bandwidth * 1e6 for name, bandwidth in BANDWIDTH.items()}
        shown = ", ".join(f"{name} {time:.1f} µs" for name, time in times.items())
        print(f"\n{case.name}: at least {case.bytes / 2**20:.2f} MiB, {shown} (calculated)")
        way = sampled_grad_way(case)
        if way:
            print(
                f"  {way['entries']} entries, by {way['way']}; "
                f"tiles from {way['tiles_from_entries_calculated']} entries on, "
                f"density {way['tiles_from_density_calculated']:.2%} (calculated)"
            )
        for row in rows:
            print(
                f"  {row['kernel']:22}{row['target']:>9}{row['programs']:9}{row['threads']:9}{row['registers']:10}"
                f"{row['shared_bytes']:8}{row['wide_loads']:11}  {row['occupancy_calculated']:.0%} by {row['limited_by']}"
            )
        report.append(
            {
                "case": case.name,
                "least_bytes": case.bytes,
                "least_microseconds_calculated": {name: round(time, 2) for name, time in times.items()},
                **way,
                "kernels": rows,
            }
        )
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "note": NOTE,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "bandwidth_bytes_per_second": BANDWIDTH,
        "limits_per_sm": {target: vars(limits) for target, limits in LIMITS.items()},
        "cases": report,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(
        r"{\s*(\"kernel\"[^{}]*?)\s*}", lambda row: "{" + re.sub(r"\s*\n\s*", " ", row[1]) + "}", text
    )  # one line each
    RESULTS.write_text(text + "\n")
    print(f"\nwritten to {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
