"""The accuracy benchmark on made-up images: runs once, resumes after a kill, and its arithmetic is right."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from benchmarks import accuracy, accuracy_analysis, accuracy_methods, accuracy_runs, accuracy_table, ideas
from fps_kernels.demo.data import Split, Task

ROOT = Path(__file__).parents[2]
METHODS = ("random", "GD-FPS", "full", "linear", "PEFT SHiRA")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of three classes that differ in brightness."""
    directory = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for dataset in ("one", "two"):
        for split, count in (("train", 6), ("test", 3)):
            for label in range(3):
                path = directory / dataset / split / str(label)
                path.mkdir(parents=True)
                for i in range(count):
                    pixels = torch.rand(3, 32, 32, generator=generator) * 100 + 70 * label
                    to_pil_image(pixels.to(torch.uint8)).save(path / f"{i}.png")
    return directory


def arguments(folders: Path, results: Path, *more: str) -> list[str]:
    data = [str(folders / "one"), str(folders / "two")]
    fixed = ["--anchor", data[1], "--model", "test_vit", "--image-size", "32", "--epochs", "1", "--results", str(results)]
    return ["--data", *data, *fixed, *more]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The script sets the threads of its process; and on so little work two threads wait for each other only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a process that was killed, and then of one that finished its work."""
    results = tmp_path_factory.mktemp("results") / "accuracy.jsonl"
    wanted = arguments(folders, results, "--methods", *METHODS, "--seeds", "1", "2")
    command = [sys.executable, "-m", "benchmarks.accuracy", *wanted]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(accuracy.read(results)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed at work"
    before = results.read_text()
    with results.open("a") as file:
        file.write('{"split": "test", "data')  # a line that the kill cut off
    accuracy.main(wanted)
    assert results.read_text().startswith(before)
    return results


def test_resumes_and_does_everything_once(finished: Path, folders: Path):
    lines = accuracy.read(finished)
    runs = [tuple(line[key] for key in ("split", "dataset", "method", "k", "seed", "lr")) for line in lines]
    assert len(set(runs)) == len(runs)
    tested = {run[1:5] for run in runs if run[0] == "test"}
    assert tested == {
        (dataset, method, k, seed)
        for dataset in ("one", "two")
        for method in METHODS
        for k in ((4, 1) if accuracy_methods.METHODS[method].per_k else (None,))
        for seed in (1, 2)
    }
    size = finished.stat().st_size
    accuracy.main(arguments(folders, finished, "--methods", *METHODS, "--seeds", "1", "2"))
    assert finished.stat().st_size == size


def test_a_line_says_what_was_done(finished: Path):
    lines = [line for line in accuracy.read(finished) if line["split"] == "test"]
    for line in lines:
        right = accuracy_runs.from_bits(line["bits"], line["total"])
        assert int(right.sum()) == line["correct"]
        assert line["accuracy"] == pytest.approx(line["correct"] / line["total"], abs=1e-6)
        assert line["total"] == 9
        assert {"torch", "processor", "commit", "seconds", "head_lr"} <= line.keys()
    of = {(line["method"], line["k"]): line for line in lines}
    assert of["random", 4]["trained"] == of["GD-FPS", 4]["trained"]
    assert of["random", 1]["trained"] < of["random", 4]["trained"] < of["full", None]["trained"]
    assert of["random", 4]["update"]["relative_norm"] > 0


def test_rates_come_from_held_out_images_only(finished: Path):
    lines = accuracy.read(finished)
    for line in (line for line in lines if line["split"] == "test"):
        method = accuracy_methods.METHODS[line["method"]]
        found = accuracy.searched(lines, line["dataset"], line["method"])
        assert accuracy.next_rate(found, method.rates, method.start) is None
        assert line["lr"] == accuracy.best_rate(found, method.rates)
    assert {line["total"] for line in lines if line["split"] == "search"} == {6}  # 2 of the 6 training images of each class


def test_screening_needs_no_test_images(finished: Path, folders: Path, tmp_path: Path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(finished.read_text())
    accuracy.main(arguments(folders, copy, "--methods", "class std drawn", "--seeds", "1", "--screen", "1e-3"))
    new = accuracy.read(copy)[len(accuracy.read(finished)) :]
    assert [(line["split"], line["dataset"], line["seed"]) for line in new] == [
        ("screen", dataset, 1) for dataset in ("one", "two")
    ]
    assert {line["total"] for line in new} == {9}  # half of the training images
    assert "class std drawn" in accuracy_table.render(accuracy.read(copy))


def test_a_time_limit_leaves_the_rest_for_later(folders: Path, tmp_path: Path):
    accuracy.main(arguments(folders, tmp_path / "none.jsonl", "--methods", "linear", "--time-limit", "0"))
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [([], "--data"), (["--data", "/nowhere"], "no folder"), (["--data", os.curdir], "--anchor")],
)
def test_arguments_are_checked(wanted: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        accuracy.main(wanted)
    assert message in capsys.readouterr().err


def test_climbs_until_both_neighbours_are_worse():
    loss = {1e-4: 9.0, 3e-4: 5.0, 1e-3: 3.0, 3e-3: 1.0, 1e-2: 6.0, 3e-2: 7.0}
    found: dict[float, float] = {}
    order = []
    while (rate := accuracy.next_rate(found, tuple(loss), 1e-3)) is not None:
        found[rate] = loss[rate]
        order.append(rate)
    assert order == [1e-3, 3e-4, 3e-3, 1e-2]
    assert accuracy.best_rate(found, tuple(loss)) == 3e-3
    assert accuracy.next_rate({1e-4: 2.0, 3e-4: 3.0}, tuple(loss), 1e-4) is None  # the end of the grid


def test_bits():
    right = torch.rand(13, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(accuracy_runs.from_bits(accuracy_runs.to_bits(right), 13), right)
    assert accuracy_runs.to_bits(torch.tensor([True, False, False, False, True])) == "88"
    assert accuracy_runs.from_bits("0f", 8).tolist() == [False] * 4 + [True] * 4


def line(method: str, seed: int, right: list[bool], k: int | None = 4, dataset: str = "one") -> dict[str, object]:
    bits = accuracy_runs.to_bits(torch.tensor(right))
    share = sum(right) / len(right)
    return {
        "split": "test", "dataset": dataset, "method": method, "k": k, "seed": seed, "lr": 1e-3, "accuracy": share,
        "correct": sum(right), "total": len(right), "bits": bits, "trained": 1, "update": {}, "loss": 0.0,
    }  # fmt: skip


def test_paired_differences():
    lines = [
        line("random", 1, [True, True, False, False]), line("FPS", 1, [True, True, True, False]),
        line("random", 2, [True, False, False, False]), line("FPS", 2, [True, False, False, False]),
        line("random", 3, [True, False, False, False]), line("FPS", 3, [True, True, True, False]),
        line("FPS", 4, [True, True, True, True]),  # has no pair
        line("full", 1, [False, False, False, False], k=None),
    ]  # fmt: skip
    runs = accuracy_table.paired_runs(lines, "FPS", "random", {4})
    assert runs.count == 3
    assert runs.mean == pytest.approx(0.25)
    assert runs.error == pytest.approx(0.25 / math.sqrt(3))  # of 0.25, 0, 0.5
    assert runs.half == pytest.approx(4.302653 * runs.error)  # Student's t with two degrees of freedom
    images = accuracy_table.paired_images(lines, "FPS", "random", {4})
    per_image = torch.tensor([0, 1 / 3, 2 / 3, 0], dtype=torch.float64)
    assert images.mean == pytest.approx(0.25)
    assert images.error == pytest.approx(float(per_image.std()) / 2)
    assert images.half == pytest.approx(NormalDist().inv_cdf(0.975) * images.error)
    assert accuracy_table.paired_runs(lines, "full", "random", {4}).mean == pytest.approx(-0.5)
    more = [*lines, line("random", 1, [True, False, False, False], k=1)]
    both = accuracy_table.paired_runs(more, "full", "random", {1, 4})  # one run of full tuning is one observation
    assert (both.count, both.mean) == (1, pytest.approx(-0.375))
    assert accuracy_table.paired_runs(more, "random", "full", {1, 4}).count == 1
    assert "FPS" in accuracy_table.render(lines)


def test_update_summary_of_known_matrices():
    before = {"blocks.0.w": torch.ones(4, 6), "head.weight": torch.ones(2, 2)}
    change = torch.zeros(4, 6)
    change[0, 1], change[2, 5] = 0.5, -0.5
    found = accuracy_runs.update_summary(
        before, {"blocks.0.w": before["blocks.0.w"] + change, "head.weight": torch.zeros(2, 2)}
    )
    assert found == {
        "effective_rank": pytest.approx(2.0), "rank_share": pytest.approx(0.5), "columns": pytest.approx(2 / 6, abs=1e-5),
        "largest_column": pytest.approx(0.5), "relative_norm": pytest.approx((0.5 / 24) ** 0.5, abs=1e-5),
    }  # fmt: skip
    assert accuracy_runs.update_summary(before, before) == {}


def test_held_out_images_are_of_the_training_images_and_of_every_class():
    images = torch.arange(20).view(20, 1, 1, 1).float()
    task = Task("t", 2, Split(images, torch.arange(20) % 2), Split(images + 100, torch.zeros(20).long()), (0.0,), (1.0,))
    parts = accuracy_runs.held_out(task, seed=1, share=0.3)
    assert len(parts.train) == 14
    assert parts.test.target.bincount().tolist() == [3, 3]
    assert sorted(torch.cat([parts.train.images, parts.test.images]).flatten().tolist()) == list(range(20))
    assert not torch.equal(parts.test.images, accuracy_runs.held_out(task, seed=2, share=0.3).test.images)


def test_every_idea_keeps_the_budget(folders: Path):
    settings = accuracy_runs.Settings("test_vit", None, 32, 1, anchor=folders / "two")
    occasion = accuracy_runs.Workshop(settings).occasion(folders / "one", k=2, seed=1)
    random = accuracy_methods.CHOICES["random"](occasion)
    for name, idea in ideas.IDEAS.items():
        selection = idea(occasion)
        assert abs(selection.nnz / random.nnz - 1) < 0.15, name  # whole entries per row of fewer rows
        assert selection.dense == random.dense, name
        for w in selection.values():
            assert w.flat().unique().numel() == w.nnz, name
    for name, w in ideas.IDEAS["FPS capped"](occasion).items():
        even = w.nnz / w.layout.shape[1]
        assert int(w.columns.long().bincount().max()) <= 1.25 * max(1, 2 * even), name


def test_analysis_of_choices(folders: Path):
    settings = accuracy_runs.Settings("test_vit", None, 32, 0, anchor=folders / "two")
    occasion = accuracy_runs.Workshop(settings).occasion(folders / "one", k=2, seed=1)
    rows, chosen = accuracy_analysis.analyse(occasion, ["random", "FPS", "GPS"])
    for row in rows:
        assert row["overlap"][row["method"]] == 1
        assert 0 < row["columns"] <= 1
        assert 0 < row["gradient_steps_new_head"] < 1
    energy = {name: torch.ones(w.layout.parameter_shape) for name, w in chosen["FPS"].items()}
    assert accuracy_analysis.caught(chosen["FPS"], energy) == pytest.approx(chosen["FPS"].density)
    assert json.dumps(rows)


def test_concentration_is_correlated_over_methods():
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    lines = [
        {
            "dataset": dataset,
            "method": method,
            "accuracy": base + share,
            "update": {"columns": share, "effective_rank": -share, "largest_column": share**2, "relative_norm": share},
        }
        for dataset, base in (("one", 0.1), ("two", 0.5))
        for method, share in shares.items()
    ]
    lines.append({"dataset": "one", "method": "no update", "accuracy": 0.9, "update": {}})
    head, body = accuracy_table.concentration_rows(lines)
    found = {row[0]: row[1:] for row in body}
    assert found["columns that changed"][0] == "+1.00"
    assert found["effective rank"][0] == "-1.00"
    assert found["columns that changed"][2] == "4"
    assert len(head) == len(body[0])
