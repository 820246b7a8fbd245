"""One command for whoever has a GPU: ``python -m benchmarks.gpu_check [--output FOLDER]``; under 8 minutes on an H100.

Runs the op suite without the interpreter, then measures: bandwidth of each kernel against a copy, choosing over a forward
pass, GPS over FPS, a training step against full tuning and LoRA, the optimizer's step against fused AdamW, and its capture
in a CUDA graph. Writes ``gpu_check.json`` and ``gpu_check.md``. A check that fails is reported with its error, the others go
on, and the exit code is 1. Without a GPU ``--device cpu --quick`` runs every path, at sizes that say nothing about speed.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_check import checks
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.measuring import machine
from fps_kernels import ops

Rows = list[dict[str, Any]]


def op_suite(bench: Bench, quick: bool) -> Rows:
    """``pytest tests/ops``: with a GPU its Triton lane runs compiled kernels."""
    root = Path(__file__).parents[2]
    chosen = ["-k", "triton and not compiles_well"] if bench.device.type == "cuda" else ["-k", "test_empty and reference"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", *chosen]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    failed = re.findall(r"^FAILED (.*)$", done.stdout, re.MULTILINE)
    row = {"command": " ".join(["pytest", *command[3:]]), "summary": summary, "seconds": time.perf_counter() - start}
    if done.returncode:
        raise RuntimeError("\n".join([summary, *failed[:40]]))
    return [row]


CHECKS: dict[str, Callable[[Bench, bool], Rows]] = {
    "op suite": op_suite,
    "bandwidth of the kernels": checks.bandwidth,
    "choosing over a forward pass": checks.choosing,
    "GPS over FPS": checks.gps_over_fps,
    "training step": checks.training,
    "optimizer step": checks.optimizer,
    "CUDA graph": checks.graph,
}


def hardware(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    found: dict[str, Any] = {**machine(), "triton": triton.__version__, "platform": platform.platform()}
    found["backends"] = {op: ops.backend_for(op, device) for op in ("column_norm_", "score_topk", "sampled_grad")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"# GPU check: {report['hardware'].get('gpu', 'no GPU')}", "", f"`{report['command']}`", ""]
    lines += [f"* {key}: {value}" for key, value in report["hardware"].items()]
    for name, check in report["checks"].items():
        lines += ["", f"## {name}", "", f"{check['seconds']:.1f} s" + ("" if check["passed"] else ", **FAILED**"), ""]
        if not check["passed"]:
            lines += ["```", check["error"], "```"]
        rows = check["rows"]
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def run(device: torch.device, quick: bool, names: list[str]) -> dict[str, Any]:
    """Every check, each on its own."""
    bench = Bench(device, rounds=3 if quick else 20, warmup=1 if quick else 3)
    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        start, rows, error = time.perf_counter(), [], None
        try:
            rows = CHECKS[name](bench, quick)
        except Exception:  # whatever it is, the report says it, and the other checks still run
            error = traceback.format_exc(limit=-6)
        seconds = time.perf_counter() - start
        found[name] = {"passed": error is None, "error": error, "seconds": seconds, "rows": rows}
        print(f"{name}: {'passed' if error is None else 'FAILED'} in {seconds:.1f} s", flush=True)
        if error is not None:
            print(error, file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    command = f"python -m benchmarks.gpu_check --device {device.type}" + (" --quick" if quick else "")
    return {"command": command, "hardware": hardware(device), "checks": found}


def main() -> None:
    """Run, write both reports, exit with 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS), help="some checks")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the reports")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --quick runs the same paths without one")
    report = run(torch.device(options.device), options.quick, options.only)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu_check.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (options.output / "gpu_check.md").write_text(markdown(report))
    print(f"written: {options.output / 'gpu_check.json'}, {options.output / 'gpu_check.md'}")
    sys.exit(not all(check["passed"] for check in report["checks"].values()))
