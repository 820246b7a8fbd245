"""Comparing two commits: which figures are read, what counts as noise, and when it fails. Nothing is measured here."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Figures, MeasuringError

RESULTS = Path(compare.__file__).parent / "results"


def disturbed(time: float, spread: float, rounds: int, generator: random.Random) -> list[float]:
    return [time * math.exp(generator.gauss(0, spread)) for _ in range(rounds)]


def test_times_and_bytes_are_read_with_their_units():
    rows = [
        {"model": "ViT", "batch": 8, "method": "full", "step_ms": 4.5, "peak_bytes": 100, "time_over_full": 1.0},
        {"model": "ViT", "method": "FPS", "simulated": 90, "over_fps": 1.0},
        {"sweep": "k", "label": "k=4", "quantity": "time", "method": "FPS", "value": 3.5, "simulated": False},
        {"sweep": "k", "label": "k=4", "quantity": "memory", "method": "FPS", "value": 70},
    ]
    assert compare.figures("all", rows) == {
        "all: ViT, full, step_ms": (4.5, "ms"),
        "all: ViT, full, peak_bytes": (100, "bytes"),
        "all: ViT, FPS, simulated": (90, "bytes"),
        "all: k, k=4, time, FPS, value": (3.5, "ms"),
        "all: k, k=4, memory, FPS, value": (70, "bytes"),
    }


def test_what_an_op_is_held_against_names_a_row_but_is_no_figure_of_ours():
    row = {"op": "topk", "ms": 1.0, "against": "W.sum()", "against_ms": 2.0, "target": "≤ 2×", "met": True, "gbytes": 0.1}
    assert compare.figures("kernels", [row]) == {"kernels: topk, W.sum(), ms": (1.0, "ms")}


def test_rows_that_differ_in_numbers_only_are_told_apart():
    assert list(compare.figures("b", [{"op": "x", "ms": 1.0}, {"op": "x", "ms": 2.0}])) == ["b: x, ms", "b: x, ms #2"]


@pytest.mark.parametrize("name", compare.BENCHMARKS)
def test_every_benchmark_has_figures(name: str):
    rows = json.loads((RESULTS / f"{name}_quick.json").read_text())["rows"]
    found = compare.figures(name, rows)
    assert len(found) >= len(rows)
    assert all(value > 0 for value, _ in found.values())


def test_noise_is_what_rounds_of_one_commit_say_about_each_other():
    assert compare.noise([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]) == 0
    quiet, loud = compare.noise([[100, 101, 99]] * 2), compare.noise([[100, 110, 90]] * 2)
    assert 0 < quiet < loud
    assert compare.noise([[100, 101, 99] * 3] * 2) < quiet  # more rounds
    assert compare.noise([[100, 101, 99, 100, 1000]] * 2) < 0.1  # one disturbed round


def test_nothing_changed_rarely_fails():
    generator = random.Random(0)
    failed = 0
    for _ in range(2000):
        base, head = (disturbed(10, 0.05, 5, generator) for _ in range(2))
        failed += compare.judge("x", "ms", base, head).worse
    assert failed <= 10


def test_a_slowdown_beyond_allowance_and_noise_fails_and_one_within_does_not():
    base = [100.0, 101.0, 99.0, 100.0, 100.5]
    verdict = compare.judge("x", "ms", base, [1.3 * time for time in base])
    assert verdict.ratio == pytest.approx(1.3)
    assert verdict.worse
    assert not compare.judge("x", "ms", base, [1.04 * time for time in base]).worse
    assert not compare.judge("x", "ms", base, [0.5 * time for time in base]).worse
    loud = [100.0, 150.0, 70.0, 120.0, 90.0]
    assert not compare.judge("x", "ms", loud, [1.3 * time for time in loud]).worse


def test_a_machine_that_slows_down_for_both_is_no_slowdown():
    drift = [100.0, 130.0, 170.0]
    assert compare.judge("x", "ms", drift, drift).ratio == 1


def test_bytes_are_compared_exactly():
    assert compare.judge("x", "bytes", [1000.0] * 3, [1001.0] * 3).worse
    assert not compare.judge("x", "bytes", [1000.0] * 3, [1000.0] * 3).worse
    assert not compare.judge("x", "bytes", [1000.0] * 3, [999.0] * 3).worse
    assert not compare.judge("x", "bytes", [1000.0, 1002.0, 1000.0], [1001.0] * 3).worse
    assert compare.judge("x", "bytes", [0.0] * 3, [1.0] * 3).ratio == math.inf


def test_figures_of_one_commit_are_listed_and_not_compared():
    base: list[Figures] = [{"same": (1.0, "ms"), "gone": (1.0, "ms")}] * 3
    head: list[Figures] = [{"same": (1.0, "ms"), "new": (5.0, "ms")}] * 3
    verdicts, only_base, only_head = compare.compare(base, head)
    assert [verdict.figure for verdict in verdicts] == ["same"]
    assert (only_base, only_head) == (["gone"], ["new"])
    report = compare.report(verdicts, only_base, only_head)
    assert "only in base, not compared: gone" in report
    assert "only in head, not compared: new" in report
    assert "0 of 1 figures are worse" in report


def test_the_report_says_what_is_worse_and_what_is_too_noisy_to_say():
    base: list[Figures] = [{"step": (x, "ms"), "peak": (64, "bytes"), "wild": (x**30, "ms")} for x in (1.0, 1.02, 0.99)]
    head: list[Figures] = [{**figures, "step": (2 * figures["step"][0], "ms"), "peak": (65, "bytes")} for figures in base]
    verdicts, *_ = compare.compare(base, head)
    lines = compare.report(verdicts, [], []).splitlines()
    assert [line.split()[0] for line in lines if "SLOWER" in line] == ["step"]
    assert [line.split()[0] for line in lines if "MORE BYTES" in line] == ["peak"]
    assert any(line.startswith("times with over 25% noise") and line.endswith(": 1") for line in lines)


def test_exit_codes():
    better, worse = (compare.judge("x", "ms", [1.0] * 3, [time] * 3) for time in (0.9, 2.0))
    assert compare.exit_code([better]) == 0
    assert compare.exit_code([better, worse]) == 1
    assert compare.exit_code([]) == 2


def test_sides_take_turns():
    assert [side for _, side in compare.turns(3)] == ["base", "head", "head", "base", "base", "head"]


def test_benchmarks_of_bytes_run_once_and_those_that_a_commit_lacks_not_at_all(monkeypatch, tmp_path):
    ran = []

    def measure(tree: Path, benchmark: str, log: Path) -> Figures:
        ran.append((tree.name, benchmark))
        return {benchmark: (1.0, "bytes" if benchmark == "memory_vs_gps" else "ms")}

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "has", lambda tree, benchmark: (tree.name, benchmark) != ("base", "deltas"))
    trees = {side: tmp_path / side for side in ("base", "head")}
    measured = compare.measure_both(trees, ["memory_vs_gps", "kernels", "deltas"], 3)
    assert ran.count(("base", "memory_vs_gps")) == ran.count(("head", "memory_vs_gps")) == 1
    assert ran.count(("base", "kernels")) == ran.count(("head", "deltas")) == 3
    assert ("base", "deltas") not in ran
    verdicts, only_base, only_head = compare.compare(measured["base"], measured["head"])
    assert [verdict.figure for verdict in verdicts] == ["memory_vs_gps", "kernels"]
    assert (only_base, only_head) == ([], ["deltas"])


def test_a_benchmark_may_be_a_file_or_a_folder(tmp_path):
    (tmp_path / "benchmarks" / "training").mkdir(parents=True)
    (tmp_path / "benchmarks" / "kernels.py").touch()
    assert compare.has(tmp_path, "kernels")
    assert not compare.has(tmp_path, "training")
    (tmp_path / "benchmarks" / "training" / "__main__.py").touch()
    assert compare.has(tmp_path, "training")


def test_sources_from_elsewhere_are_refused(tmp_path):
    # The child of a tree without a package finds that of this checkout, and must not measure it.
    (tmp_path / "tree").mkdir()
    with pytest.raises(MeasuringError, match="is imported from"):
        root = str(compare.ROOT)
        compare.run(sys.executable, "-c", compare.CHILD, tmp_path / "tree", "kernels", folder=tmp_path, PYTHONPATH=root)


def test_the_working_tree_is_a_commit_that_no_branch_has(monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    run = compare.run
    monkeypatch.setattr(compare, "run", lambda *command: run(*command, folder=tmp_path))
    git("init", "--quiet")
    (tmp_path / "file").write_text("committed\n")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    assert compare.working_tree() == git("rev-parse", "HEAD")

    (tmp_path / "file").write_text("changed\n")
    commit = compare.working_tree()
    assert git("show", f"{commit}:file") == "changed"
    assert git("status", "--short") == "M file"
    assert git("stash", "list") == ""
    assert git("rev-parse", "HEAD") == git("rev-parse", f"{commit}^1")


def test_what_cannot_be_measured_is_another_failure_than_a_slowdown(capsys):
    assert compare.main(["no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        compare.main(["HEAD", "--rounds", "2"])
    assert stopped.value.code == 2
