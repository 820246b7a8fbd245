"""Executes every kernel on the CPU as a GPU would: a line for each case, and a table; exits with 1 if one has problems.

Each case runs twice, by Triton's launcher and by repeated launches, and small ones in three orders of their programs.
``docs/kernel-lab.md`` says how to read a line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from kernel_lab.ptx import report
from kernel_lab.ptx.cases import cases
from kernel_lab.ptx.checking import Checked, check


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernel_lab.ptx", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="OP", default="", help="cases of the ops in whose name this is")
    parser.add_argument("--match", metavar="TEXT", default="", help="cases in whose line this is")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], choices=(80, 90), help="of the GPU")
    parser.add_argument("--one-order", action="store_true", help="programs run in one order only")
    parser.add_argument(
        "--large", choices=("only", "no", "too"), default="too", help="cases that are there for their traffic"
    )
    parser.add_argument("--lane", action="store_true", help="only the cases that the test suite runs")
    parser.add_argument("--traffic", action="store_true", help="where the sectors of large cases go")
    parser.add_argument("--notes", action="store_true", help="what may be harmless, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    wanted = parsed(arguments)
    torch.set_num_threads(1)  # what it executes is small
    chosen = [
        case
        for case in cases()
        if wanted.only in case.op
        and wanted.match in str(case)
        and (case.lane or not wanted.lane)
        and wanted.large in ("too", "only" if case.large else "no")
    ]
    results: list[Checked] = []
    begun = time.perf_counter()
    for case in chosen:
        for capability in wanted.capability:
            started = time.perf_counter()
            checked = check(case, f"sm_{capability}", not wanted.one_order)
            print(report.line(checked, time.perf_counter() - started), flush=True)
            if wanted.notes and checked.notes:
                print(*(f"    {note}" for note in checked.notes), sep="\n")
            if wanted.traffic and case.large:
                print(report.traffic(checked.launched))
            results.append(checked)
    bad = sum(bool(checked.problems) for checked in results)
    print("\n" + report.table(results))
    print(f"\n{len(results)} cases, {bad} with problems, {time.perf_counter() - begun:.0f} s")
    if wanted.json:
        wanted.json.write_text(json.dumps([report.figures(checked) for checked in results], indent=1) + "\n")
    return int(bad > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
