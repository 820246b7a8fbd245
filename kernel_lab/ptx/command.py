"""Executes every kernel on the CPU as a GPU would: a line for each case, and a table; exits with 1 if one has problems.

Each case runs twice, by Triton's launcher and by repeated launches, and small ones in three orders of their programs.
``docs/kernel-lab.md`` says how to read a line.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from kernel_lab.ptx import report
from kernel_lab.ptx.cases import Case, cases
from kernel_lab.ptx.checking import check


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
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count() or 1, help="processes at once; all cores")
    return parser.parse_args(arguments)


class Job(NamedTuple):
    """A case on one GPU, by its number in :func:`~kernel_lab.ptx.cases.cases`: what processes hand to each other."""

    number: int
    target: str
    all_orders: bool
    traffic: bool
    notes: bool


def perform(job: Job) -> tuple[str, report.Figures]:
    """What is printed of a case, and its figures."""
    torch.set_num_threads(1)  # what it executes is small
    started = time.perf_counter()
    case = list(cases())[job.number]
    checked = check(case, job.target, job.all_orders)
    told = [report.line(checked, time.perf_counter() - started)]
    if job.notes:
        told += [f"    {note}" for note in checked.notes]
    if job.traffic and case.large:
        told.append(report.traffic(checked.launched))
    return "\n".join(told), report.figures(checked)


def chosen(wanted: argparse.Namespace) -> Iterator[Job]:
    def fits(case: Case) -> bool:
        size = wanted.large in ("too", "only" if case.large else "no")
        return wanted.only in case.op and wanted.match in str(case) and size and (case.lane or not wanted.lane)

    for number, case in enumerate(cases()):
        if fits(case):
            for capability in wanted.capability:
                yield Job(number, f"sm_{capability}", not wanted.one_order, wanted.traffic, wanted.notes)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    wanted = parsed(arguments)
    begun, jobs = time.perf_counter(), list(chosen(wanted))
    results = []
    for told, figures in performed(jobs, min(wanted.jobs, len(jobs))):
        print(told, flush=True)
        results.append(figures)
    bad = sum(bool(figures["problems"]) for figures in results)
    print("\n" + report.table(results))
    print(f"\n{len(results)} cases, {bad} with problems, {time.perf_counter() - begun:.0f} s")
    if wanted.json:
        told = " ".join(sys.argv[1:] if arguments is None else arguments)
        content = {"command": f"python -m kernel_lab.ptx {told}", "torch": torch.__version__, "triton": triton.__version__}
        wanted.json.write_text(json.dumps({**content, "cases": results}, indent=1) + "\n")
    return int(bad > 0 or not results)


def performed(jobs: list[Job], processes: int) -> Iterator[tuple[str, report.Figures]]:
    """In their order, several at once."""
    if processes <= 1:
        yield from map(perform, jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(perform, jobs)
