"""What the benchmarks share: contestants that take turns, and results that say where they come from."""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def alternate(contestants: dict[str, Callable[[], object]], rounds: int, before: int = 0) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round, after one round that does not count.

    Machines are noisy, so that only ratios within a round mean something. The order is turned around in every other
    round, so that no contestant always profits from what the one before it left in the caches.

    Args:
        contestants: what to run, by name.
        rounds: how often.
        before: runs of the same contestant that do not count before each that does, for what is done many times on end.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for i in range(rounds):
        for name, run in list(contestants.items())[:: 1 if i % 2 == 0 else -1]:
            for _ in range(before):
                run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over the rounds of ``ours / theirs`` within a round."""
    return statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True))


def machine() -> dict[str, str | int]:
    """Processor, threads, versions and commit."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Of the code that runs; a checkout may have been copied to where there is no git."""
    if shutil.which("git") is None:
        return "unknown"
    git = partial(subprocess.run, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    commit = git(["git", "describe", "--always"]).stdout.strip()
    # Results that this or another benchmark has written don't make the code another one.
    if git(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]).stdout.strip():
        commit += "-dirty"
    return commit or "unknown"


def save(name: str, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write ``results/<name>.json``: the rows, and the command and machine that made them."""
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "machine": machine(), **more, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def table(head: list[str], body: list[list[str]]) -> str:
    """Columns aligned to the width of their content."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
