"""A run of tune that is killed and started again ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.cli.running import cli, start

# Everything that could depend on where a run was stopped: random crops, stochastic depth, gradients of several batches
# in a step, a last step of an epoch with fewer images, norms of gradients.
RECIPE = ["--epochs", 3, "--accumulate", 2, "--augment", "crop", "--drop-path", 0.3, "--label-smoothing", 0.1]
RECIPE += ["--clip-grad", 1, "--lr", 0.01, "--k", 2, "--log-steps", 1]
STEPS = 6  # 13 images in batches of 4, two batches a step
TIMES = {"step_seconds", "images_per_second", "seconds", "peak_memory"}


def records(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["type"] != "start"]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"type": "train"') if path.is_file() else 0


def content(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:  # the order of the metadata is not always the same
        return file.metadata(), load_file(path)


def assert_same_files(one: Path, other: Path) -> None:
    (mine, tensors), (theirs, others) = content(one), content(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert mine == theirs


def assert_same_end(folder: Path, other: Path) -> None:
    assert records(folder / "task.run") == records(other / "task.run")
    assert_same_files(folder / "task.safetensors", other / "task.safetensors")
    mine, theirs = (content(f / "task.run/state/state.safetensors")[1] for f in (folder, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def command(folder: Path, small: list[object], *more: object) -> list[object]:
    folder.mkdir(exist_ok=True)
    return ["tune", *small, *RECIPE, *more, "--output", folder / "task.safetensors"]


@pytest.fixture(scope="module")
def straight(task, checkpoint, tmp_path_factory) -> Path:
    """A run that nobody disturbed, in a process of its own as the others."""
    folder = tmp_path_factory.mktemp("straight")
    small = ["test_vit", "--checkpoint", checkpoint, "--data", task, "--image-size", 32, "--workers", 0, "--batch-size", 4]
    assert start(folder / "log", *command(folder, small)).wait() == 0, (folder / "log").read_text()
    return folder


def test_killed_at_a_random_step(straight, small, tmp_path):
    arguments = command(tmp_path, small, "--save-steps", 2)
    run, when = tmp_path / "task.run", random.Random(torch.initial_seed()).randint(1, STEPS)
    running = start(tmp_path / "log", *arguments, "--workers", 1)
    running.signal_when(lambda: lines(run) >= when, signal.SIGKILL)
    assert running.wait() in (-signal.SIGKILL, 0)  # it may have come to its end meanwhile
    # At once: the process that reads images is still there and must not hold the folder.
    assert start(tmp_path / "log", *arguments).wait() == 0, (tmp_path / "log").read_text()
    assert_same_end(tmp_path, straight)


def _kill_in_save(function: str, number: int) -> None:
    """This process dies in the call of ``os.replace`` or ``os.fsync`` that belongs to the save of that number."""
    real, calls = getattr(os, function), []

    def deadly(*arguments: object) -> object:
        at = str(arguments[-1]) if function == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
        if "/state/" in at:
            calls.append(at)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, function, deadly)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_killed_while_it_saves(straight, small, tmp_path, function):
    arguments, number = command(tmp_path, small, "--save-steps", 1), random.Random(torch.initial_seed()).randint(1, 5)
    running = start(tmp_path / "log", *arguments, prepare=_kill_in_save, given=(function, number))
    assert running.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    state = tmp_path / "task.run/state"
    assert [p for p in state.iterdir() if p.name.startswith(".")]  # what it had written so far
    assert not (tmp_path / "task.safetensors").exists()
    assert start(tmp_path / "log", *arguments).wait() == 0, (tmp_path / "log").read_text()
    assert [p.name for p in state.iterdir()] == ["state.safetensors"]
    assert_same_end(tmp_path, straight)


def test_interrupted_in_order_and_resumed_with_workers(straight, small, tmp_path):
    arguments, run = command(tmp_path, small), tmp_path / "task.run"
    running = start(tmp_path / "log", *arguments)
    running.signal_when(lambda: lines(run) >= 2, signal.SIGINT)
    assert running.wait() == 130
    told = (tmp_path / "log").read_text().splitlines()[-1]
    assert told.startswith("interrupted: at step ")
    assert "the same command goes on from there" in told
    before = load_file(run / "state/state.safetensors")
    assert before["optimizer:0:step"] >= 2  # nothing that was done is lost
    resumed = start(tmp_path / "log", *arguments, "--workers", 1)
    assert resumed.wait() == 0, (tmp_path / "log").read_text()
    assert "resumed at step" in (tmp_path / "log").read_text()
    assert_same_end(tmp_path, straight)


def test_a_finished_run_only_writes_its_delta_again(straight, small, tmp_path):
    written, state = (straight / name for name in ("task.safetensors", "task.run/state/state.safetensors"))
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(written.read_bytes())
    saved, told = state.stat().st_mtime_ns, records(straight / "task.run")
    written.unlink()
    done = cli(*command(straight, small), "--json")
    assert done.code == 0, done.err
    assert_same_files(written, kept)
    assert state.stat().st_mtime_ns == saved
    assert records(straight / "task.run") == told
    assert json.loads(done.out)["accuracy"] == told[-1]["accuracy"]


def test_other_settings_are_refused(straight, small):
    for more, told in (
        (["--lr", 0.02], "lr is 0.01 there and 0.02 here;"),
        (["--seed", 1], "base is"),
        (["--scorer", "magnitude"], 'choice is {"scorer": "fps"'),
    ):
        done = cli(*command(straight, small), *more)
        assert done.code == 2
        assert told in done.message, done.message
        assert "give another --run" in done.message


def test_two_processes_do_not_share_a_run(small, tmp_path):
    arguments, run = command(tmp_path, small, "--epochs", 1000), tmp_path / "task.run"
    running = start(tmp_path / "log", *arguments)
    try:
        running.signal_when(lambda: lines(run) >= 1, signal.SIGCONT)
        done = cli(*arguments)
        assert (done.code, done.message) == (2, f"error: another process is tuning in {run}")
    finally:
        running.process.kill()
    running.wait()


def test_what_is_no_run_or_damaged_is_refused(straight, small, tmp_path):
    other = tmp_path / "pictures"
    other.mkdir()
    (other / "holiday.txt").write_text("do not touch")
    done = cli(*command(tmp_path, small), "--run", other)
    assert (done.code, done.message) == (2, f"error: {other} is there already and is no run folder: give another --run")
    copy = tmp_path / "copy.run"
    for name in ("settings.json", "selection.safetensors", "metrics.jsonl", "state/state.safetensors"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((straight / "task.run" / name).read_bytes())
    metrics = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(metrics[: len(metrics) // 2])
    assert "metrics.jsonl is shorter than it was" in cli(*command(tmp_path, small), "--run", copy).err
    (copy / "metrics.jsonl").write_bytes(metrics)
    state = bytearray((copy / "state/state.safetensors").read_bytes())
    state[-1] ^= 1
    (copy / "state/state.safetensors").write_bytes(state)
    assert "its checksum is wrong" in cli(*command(tmp_path, small), "--run", copy).err
    (copy / "settings.json").write_text("[")
    assert "settings.json is damaged" in cli(*command(tmp_path, small), "--run", copy).err


def test_bfloat16_weights(small, tmp_path):
    """There the compact values know more than the weights."""
    straight = command(tmp_path / "a", small, "--dtype", "bf16", "--epochs", 2)
    assert cli(*straight).code == 0
    arguments = command(tmp_path / "b", small, "--dtype", "bf16", "--epochs", 2, "--save-steps", 1)
    running = start(tmp_path / "log", *arguments, prepare=_kill_in_save, given=("replace", 3))
    assert running.wait() == -signal.SIGKILL
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "resumed at step 2" in done.err
    assert_same_end(tmp_path / "b", tmp_path / "a")
