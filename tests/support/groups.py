"""Tests in several processes that talk by gloo: each runs one function of a test module."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def in_processes(function: Callable[[], None], count: int, tmp_path: Path) -> None:
    """Runs a function of a module in each of so many processes, which know themselves by ``RANK`` and ``WORLD_SIZE``."""
    environment = {
        **os.environ,
        "FPS_TEST_MEETING": f"file://{tmp_path}/meeting",
        "FPS_TEST_FOLDER": str(tmp_path),
        "WORLD_SIZE": str(count),
    }
    command = [sys.executable, "-c", f"from {function.__module__} import {function.__name__} as run; run()"]
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    for child in running:
        _, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors


def in_two_processes(function: Callable[[], None], tmp_path: Path) -> None:
    """:func:`in_processes` of two."""
    in_processes(function, 2, tmp_path)


def under_torchrun(function: Callable[[], None], count: int, tmp_path: Path) -> None:
    """The same by ``torchrun``, as whoever takes the launcher's environment expects."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    command += [sys.executable, "-c", f"from {function.__module__} import {function.__name__} as run; run()"]
    environment = {**os.environ, "FPS_TEST_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def join() -> tuple[int, int]:
    """Meet the other processes; returns the rank of this one and their number."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=size)
    return rank, size


def leave() -> None:
    """Ends the process as it is.

    To end the group first waits, with torch 2.11, for threads of Gloo without letting them call Python, as some must.
    Threads that outlive the interpreter and still hold Python objects abort the process.
    """
    sys.stderr.flush()
    os._exit(0)
