"""The tests of the ops on the device: all of them, and some under Triton's sanitizers."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from triton import knobs

from benchmarks.gpu_check.rows import NEEDS_GPU, Row, attempt
from benchmarks.shared.device_timing import Bench

ROOT = Path(__file__).parents[2]
MOST_WORKERS = 12  # each has a context of its own on the device
SANITIZERS = {"consan": "races between threads and asynchronous copies", "fpsan": "sums by another order of rounding"}


def op_suite(bench: Bench, quick: bool) -> Iterator[Row]:
    """``pytest tests/ops``: with a GPU its Triton lane, of compiled kernels, in as many processes as help."""
    chosen = "triton and not compiles_well" if bench.on_gpu else "test_empty and reference"
    workers = min(MOST_WORKERS, os.cpu_count() or 1) if bench.on_gpu else 0
    yield attempt({"lane": "triton" if bench.on_gpu else "reference"}, partial(_tested, ["tests/ops"], chosen, workers, {}))


def sanitizers(bench: Bench, quick: bool) -> Iterator[Row]:
    """The ops' Triton paths with kernels that Triton instruments: concurrency (ConSan) and floating point (FPSan)."""
    for mode, finds in SANITIZERS.items():
        label = {"sanitizer": mode, "finds": finds}
        if not bench.on_gpu:
            yield {**label, "note": NEEDS_GPU}
        elif not hasattr(knobs.compilation, "instrumentation_mode"):
            yield {**label, "note": "needs Triton 3.8"}
        else:
            environment = {"TRITON_INSTRUMENTATION_MODE": mode, "TRITON_ALWAYS_COMPILE": "1"}
            tests = ["tests/ops/test_triton_paths.py"]
            yield attempt(label, partial(_tested, tests, "not opcheck and not cached", MOST_WORKERS, environment))


def _tested(tests: list[str], chosen: str, workers: int, environment: dict[str, str]) -> Row:
    command = ["-q", "-p", "no:cacheprovider", *tests, "-k", chosen, *(["-n", str(workers)] if workers else [])]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    row = {"command": " ".join(["pytest", *command]), "summary": summary, "seconds": time.perf_counter() - start}
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
        row["failed"] = "; ".join([summary, *failed[:40]])
    return row
