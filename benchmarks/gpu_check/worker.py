"""One check, in a process of its own: ``python -m benchmarks.gpu_check.worker CHECK DEVICE ROWS [--quick]``.

It ends when its standard input does: whoever started it is gone then.
"""

import argparse
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.rows import Row
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.measuring import machine
from fps_kernels import ops

HARDWARE = "hardware"  # the key of the first line, which is no row


def hardware(device: torch.device) -> dict[str, Any]:
    """What it runs on."""
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


def run(name: str, device: torch.device, quick: bool, emit: Callable[[Row], None]) -> bool:
    """One check, whose rows are handed over as they come; whether none of them says that something is wrong."""
    torch.manual_seed(0)
    bench = Bench(device, rounds=2 if quick else 20, warmup=1 if quick else 3)
    right = True
    for row in CHECKS[name].run(bench, quick):
        emit(row)
        right = right and "failed" not in row
    return right


@contextmanager
def _lines(path: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        yield write


def _end_with_the_parent() -> None:
    sys.stdin.read()
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the tests that a check has started
    os._exit(1)


def main() -> None:
    """Run the check; exit with 1 if a row of it says that something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.worker")
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("device")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    device = torch.device(options.device)
    with _lines(options.rows) as write:
        write({HARDWARE: hardware(device)})
        right = run(options.check, device, options.quick, write)
    sys.exit(not right)


if __name__ == "__main__":
    main()
