"""README, documentation and plots show what the results files hold."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import render, render_plots, render_tables


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the README and the documentation that are to be checked."""
    (tmp_path / "docs").mkdir()
    shutil.copy(render.ROOT / "README.md", tmp_path)
    shutil.copy(render.ROOT / "docs" / "measurements.md", tmp_path / "docs")
    shutil.copytree(render.ROOT / "docs" / "plots", tmp_path / "docs" / "plots")
    return tmp_path


def test_nothing_is_stale():
    assert render.stale() == [], "run python -m benchmarks.render"


def test_what_is_stale_is_named(copied, capsys, monkeypatch):
    monkeypatch.setattr(render.stale, "__defaults__", (copied,))
    readme = copied / "README.md"
    readme.write_text(readme.read_text().replace("| FPS, whole batch |", "| FPS, whole batch, faster |"))
    plot = sorted((copied / "docs" / "plots").glob("*.svg"))[0]
    plot.write_text(re.sub(r"<!-- data: \w+ -->", "<!-- data: 0 -->", plot.read_text()))
    (copied / "docs" / "plots" / "of_nothing.svg").write_text("<svg/>")
    with pytest.raises(SystemExit, match="1"):
        render.main(["--check"])
    said = capsys.readouterr().err
    assert {line.strip() for line in said.splitlines()[1:]} == {
        "README.md",
        f"docs/plots/{plot.name}",
        "docs/plots/of_nothing.svg",
    }


def test_a_changed_result_makes_stale(copied, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(render_tables.RESULTS, results)
    monkeypatch.setattr(render_tables, "RESULTS", results)
    content = json.loads((results / "memory_vs_gps.json").read_text())
    content["rows"][0]["simulated"] *= 2
    (results / "memory_vs_gps.json").write_text(json.dumps(content))
    assert set(render.stale(copied)) == {"README.md", "docs/measurements.md", "docs/plots/memory_of_choosing.svg"}
    render.write(copied)
    assert render.stale(copied) == []


def test_tables_without_results_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(render_tables, "RESULTS", tmp_path)
    text = (render.ROOT / "README.md").read_text()
    assert render.readme(text) == text
    assert render.page()[1] == []


def test_unknown_markers_are_refused():
    with pytest.raises(ValueError, match="speed_of_light"):
        render.readme("<!-- table:speed_of_light -->\n<!-- /table -->")


def test_every_table_of_the_readme_is_marked():
    text = (render.ROOT / "README.md").read_text()
    assert {name for _, name, _ in render.MARKED.findall(text)} == set(render.readme_tables())


def test_plots_are_repeatable():
    panel = render_plots.Panel("t", "x", "y", [render_plots.Series("a", [1.0, 2.0], [3.0, 4.0], colour="#000000")], log="xy")
    plot = render_plots.Plot("p", "d", [panel])
    assert render_plots.draw(plot) == render_plots.draw(plot)
    assert f"<!-- data: {plot.fingerprint()} -->" in render_plots.draw(plot).decode()


def test_accuracy_waits_for_the_methods_that_it_is_compared_with():
    shared = {"split": "test", "dataset": "d", "k": 4, "lr": 0.1, "trained": 5, "accuracy": 0.5, "seed": 1}
    shared |= dict.fromkeys(("model", "image_size", "epochs", "batch_size", "processor", "torch", "commit", "date"), "x")
    lines = [{**shared, "method": method} for method in sorted(render_tables.NEEDED)]
    assert render_tables.accuracy(lines[1:]) is None
    table = render_tables.accuracy(lines)
    assert table is not None
    assert "| random | 50.0 (1) |" in table
    assert "lr d" not in table
    assert "FPS minus" not in table  # no pairs of runs yet
    tried = render_tables.accuracy([*lines, {**lines[0], "method": "FPS capped"}])
    assert tried == table
    twice = [{**line, "seed": seed} for line in lines for seed in (1, 2)]
    better = [{**line, "accuracy": 0.5 + 0.01 * line["seed"]} if line["method"] == "FPS" else line for line in twice]
    assert "GPS +1.5 [-4.9, +7.9] (2)" in render_tables.lead(better, "FPS")


def test_who_is_ahead_of_random_and_gps():
    shared = {"split": "test", "dataset": "d", "k": 4, "right": "", "total": 0}
    gains = {"random": (0.5, 0.5, 0.5), "GPS": (0.5, 0.52, 0.51), "noisy": (0.5, 0.7, 0.5), "steady": (0.6, 0.63, 0.61)}
    lines = [
        {**shared, "method": method, "seed": seed, "accuracy": value}
        for method, values in gains.items()
        for seed, value in enumerate(values)
    ]
    assert render_tables.clear_winners(lines).endswith(": steady of the 2 other methods.")
    lines = [line for line in lines if line["method"] != "steady"]
    assert render_tables.clear_winners(lines).endswith(": none of the 1 other methods.")
