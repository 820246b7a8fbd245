"""``fps-kernels tune`` in two processes that torchrun started: the steps of one process, and killed runs go on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cli.running import cli
from tests.cli.test_resume import STEPS, assert_same_end, command, lines, records

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
MAIN = [sys.executable, "-c", "import fps_kernels.cli; fps_kernels.cli.main()"]


def started(folder: Path, arguments: list[object]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FPS_TEST_FOLDER": str(folder)}
    with (folder / "out").open("w") as out, (folder / "log").open("w") as log:
        return subprocess.Popen([*LAUNCH, *MAIN, *map(str, arguments)], stdout=out, stderr=log, env=environment)


def finished(folder: Path, arguments: list[object]) -> None:
    assert started(folder, arguments).wait(timeout=240) == 0, (folder / "log").read_text()


def processes_of(folder: Path, variable: bytes = b"") -> list[int]:
    """Torchrun and what it started in sessions of their own; or those of them that have a variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # of another user, or over by now
            continue
        if f"FPS_TEST_FOLDER={folder}".encode() in environment and (not variable or variable in environment):
            found.append(int(entry.name))
    return found


def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(small, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finished(straight, command(straight, small, "--save-steps", 2))
    said = (straight / "out").read_text()
    assert said.count("accuracy") == 1  # one of the two tells
    when = random.Random(torch.initial_seed()).randint(1, STEPS - 1)
    arguments = command(broken, small, "--save-steps", 2)
    running = started(broken, arguments)
    while lines(broken / "task.run") < when and running.poll() is None:
        time.sleep(0.01)
    killed = processes_of(broken)
    assert len(killed) >= 3 or running.poll() is not None
    for process in killed:
        os.kill(process, signal.SIGKILL)
    running.wait(timeout=120)
    finished(broken, arguments)
    assert_same_end(broken, straight)


def test_the_steps_of_one_process(small, tmp_path):
    """Batches are split, to the last image; 13 images in batches of 4 leave a process without one."""
    recipe = ["--epochs", 2, "--lr", 0.001, "--k", 2, "--log-steps", 1, "--augment", "crop", "--clip-grad", 1]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    arguments = {f: ["tune", *small, *recipe, "--output", f / "task.safetensors"] for f in (alone, together)}
    done = cli(*arguments[alone])
    assert done.code == 0, done.err
    finished(together, arguments[together])
    for mine, theirs in zip(records(together / "task.run"), records(alone / "task.run"), strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert abs(mine[key] - value) <= 1e-4 * abs(value), (key, mine, theirs)
            else:
                assert mine[key] == value
    found, expected = (load_file(f / "task.safetensors") for f in (together, alone))
    assert torch.equal(found["indices"], expected["indices"])
    assert (found["values_float32"] - expected["values_float32"]).abs().max() < 1e-3

    # Stopped in order by a signal to one of them, and gone on with by one process.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    arguments[stopped] = ["tune", *small, *recipe, "--output", stopped / "task.safetensors"]
    running = started(stopped, arguments[stopped])
    while lines(stopped / "task.run") < 1 and running.poll() is None:
        time.sleep(0.01)
    os.kill(processes_of(stopped, b"RANK=1")[0], signal.SIGTERM)
    assert running.wait(timeout=120) != 0
    said = (stopped / "log").read_text()
    assert said.count("the same command goes on from there") == 1, said
    done = cli(*arguments[stopped])
    assert done.code == 0, done.err
    assert "resumed at step" in done.err
    found = load_file(stopped / "task.safetensors")
    assert (found["values_float32"] - expected["values_float32"]).abs().max() < 1e-3
