"""README, documentation and plots show what the results files hold."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.render import command, tables


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the README and the documentation that are to be checked."""
    (tmp_path / "docs").mkdir()
    shutil.copy(command.ROOT / "README.md", tmp_path)
    for name in ("measurements.md", "coming-from.md"):
        shutil.copy(command.ROOT / "docs" / name, tmp_path / "docs")
    shutil.copytree(command.ROOT / "docs" / "plots", tmp_path / "docs" / "plots")
    return tmp_path


def test_nothing_is_stale():
    assert command.stale() == [], "run python -m benchmarks.render"


def test_what_is_stale_is_named(copied, capsys, monkeypatch):
    monkeypatch.setattr(command.stale, "__defaults__", (copied,))
    readme = copied / "README.md"
    readme.write_text(readme.read_text().replace("| FPS, whole batch |", "| FPS, whole batch, faster |"))
    plot = sorted((copied / "docs" / "plots").glob("*.svg"))[0]
    plot.write_text(re.sub(r"<!-- data: \w+ -->", "<!-- data: 0 -->", plot.read_text()))
    (copied / "docs" / "plots" / "of_nothing.svg").write_text("<svg/>")
    with pytest.raises(SystemExit, match="1"):
        command.main(["--check"])
    said = capsys.readouterr().err
    assert {line.strip() for line in said.splitlines()[1:]} == {
        "README.md",
        f"docs/plots/{plot.name}",
        "docs/plots/of_nothing.svg",
    }


def test_a_changed_result_makes_stale(copied, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(tables.RESULTS, results)
    monkeypatch.setattr(tables, "RESULTS", results)
    content = json.loads((results / "memory_vs_gps.json").read_text())
    content["rows"][0]["simulated"] *= 2
    (results / "memory_vs_gps.json").write_text(json.dumps(content))
    assert set(command.stale(copied)) == {
        "README.md",
        "docs/coming-from.md",
        "docs/measurements.md",
        "docs/plots/memory_of_choosing.svg",
    }
    command.write(copied)
    assert command.stale(copied) == []


def test_tables_without_results_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = (command.ROOT / "README.md").read_text()
    assert command.readme(text) == text
    assert command.page()[1] == []


def test_unknown_markers_are_refused():
    with pytest.raises(ValueError, match="speed_of_light"):
        command.readme("<!-- table:speed_of_light -->\n<!-- /table -->")


def test_every_table_of_the_readme_is_marked():
    text = (command.ROOT / "README.md").read_text()
    assert {name for _, name, _ in command.MARKED.findall(text)} == set(command.readme_tables())
