"""The accuracy benchmark on made-up images: does every run once, and resumes after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accuracy import command, methods, table
from benchmarks.accuracy.lines import from_bits, read

ROOT = Path(__file__).parents[3]
METHODS = ("random", "GD-FPS", "full", "linear", "PEFT SHiRA")


def arguments(folders: Path, results: Path, *more: str) -> list[str]:
    data = [str(folders / "one"), str(folders / "two")]
    fixed = ["--anchor", data[1], "--model", "test_vit", "--image-size", "32", "--epochs", "1", "--results", str(results)]
    return ["--data", *data, *fixed, *more]


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a process that was killed, and then of one that finished its work."""
    results = tmp_path_factory.mktemp("results") / "accuracy.jsonl"
    wanted = arguments(folders, results, "--methods", *METHODS, "--seeds", "1", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accuracy", *wanted],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(read(results)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed at work"
    before = results.read_text()
    with results.open("a") as file:
        file.write('{"split": "test", "data')  # a line that the kill cut off
    command.main(wanted)
    assert results.read_text().startswith(before)
    return results


def test_resumes_and_does_everything_once(finished: Path, folders: Path):
    lines = read(finished)
    runs = [tuple(line[key] for key in ("split", "dataset", "method", "k", "seed", "lr")) for line in lines]
    assert len(set(runs)) == len(runs)
    tested = {run[1:5] for run in runs if run[0] == "test"}
    assert tested == {
        (dataset, method, k, seed)
        for dataset in ("one", "two")
        for method in METHODS
        for k in ((4, 1) if methods.METHODS[method].per_k else (None,))
        for seed in (1, 2)
    }
    size = finished.stat().st_size
    command.main(arguments(folders, finished, "--methods", *METHODS, "--seeds", "1", "2"))
    assert finished.stat().st_size == size


def test_a_line_says_what_was_done(finished: Path):
    lines = [line for line in read(finished) if line["split"] == "test"]
    for line in lines:
        right = from_bits(line["bits"], line["total"])
        assert int(right.sum()) == line["correct"]
        assert line["accuracy"] == pytest.approx(line["correct"] / line["total"], abs=1e-6)
        assert line["total"] == 9
        assert {"torch", "processor", "commit", "seconds", "head_lr"} <= line.keys()
    of = {(line["method"], line["k"]): line for line in lines}
    assert of["random", 4]["trained"] == of["GD-FPS", 4]["trained"]
    assert of["random", 1]["trained"] < of["random", 4]["trained"] < of["full", None]["trained"]
    assert of["random", 4]["update"]["relative_norm"] > 0


def test_rates_come_from_held_out_images_only(finished: Path):
    lines = read(finished)
    for line in (line for line in lines if line["split"] == "test"):
        method = methods.METHODS[line["method"]]
        found = command.searched(lines, line["dataset"], line["method"])
        assert command.next_rate(found, method.rates, method.start) is None
        assert line["lr"] == command.best_rate(found, method.rates)
    assert {line["total"] for line in lines if line["split"] == "search"} == {6}  # 2 of the 6 training images of each class


def test_screening_needs_no_test_images(finished: Path, folders: Path, tmp_path: Path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(finished.read_text())
    command.main(arguments(folders, copy, "--methods", "class std drawn", "--seeds", "1", "--screen", "1e-3"))
    new = read(copy)[len(read(finished)) :]
    assert [(line["split"], line["dataset"], line["seed"]) for line in new] == [
        ("screen", dataset, 1) for dataset in ("one", "two")
    ]
    assert {line["total"] for line in new} == {9}  # half of the training images
    assert "class std drawn" in table.render(read(copy))


def test_a_time_limit_leaves_the_rest_for_later(folders: Path, tmp_path: Path):
    command.main(arguments(folders, tmp_path / "none.jsonl", "--methods", "linear", "--time-limit", "0"))
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [([], "--data"), (["--data", "/nowhere"], "no folder"), (["--data", os.curdir], "--anchor")],
)
def test_arguments_are_checked(wanted: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(wanted)
    assert message in capsys.readouterr().err


def test_climbs_until_both_neighbours_are_worse():
    loss = {1e-4: 9.0, 3e-4: 5.0, 1e-3: 3.0, 3e-3: 1.0, 1e-2: 6.0, 3e-2: 7.0}
    found: dict[float, float] = {}
    order = []
    while (rate := command.next_rate(found, tuple(loss), 1e-3)) is not None:
        found[rate] = loss[rate]
        order.append(rate)
    assert order == [1e-3, 3e-4, 3e-3, 1e-2]
    assert command.best_rate(found, tuple(loss)) == 3e-3
    assert command.next_rate({1e-4: 2.0, 3e-4: 3.0}, tuple(loss), 1e-4) is None  # the end of the grid
