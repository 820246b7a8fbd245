"""Which room of the benchmarks imports which, and that the commands are there."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2] / "benchmarks"
ROOMS = ("accuracy", "coverage", "gpu_check", "render")
# What prints and saves results may be read by what shows them; nothing else goes from room to room.
ALLOWED = {("render", f"accuracy.{name}") for name in ("ideas", "lines", "table")}


def imported(text: str) -> set[str]:
    """Modules of the benchmarks that a file imports, as ``room.module``, ``room`` or ``script``."""
    found = set(re.findall(r"^\s*from benchmarks\.([\w.]+) import", text, re.MULTILINE))
    for package, names in re.findall(r"^\s*from benchmarks(?:\.(\w+))? import ([\w, ]+)$", text, re.MULTILINE):
        modules = [name.split()[0] for name in names.split(",")]
        if not package:
            found.update(modules)
        elif (ROOT / package).is_dir():
            found.discard(package)
            found.update(f"{package}.{name}" for name in modules)
    return found


def test_rooms_import_shared_and_nothing_of_each_other():
    for room in ("shared", *ROOMS):
        for path in (ROOT / room).glob("*.py"):
            foreign = {name for name in imported(path.read_text()) if name.partition(".")[0] not in (room, "shared")}
            assert {(room, name) for name in foreign} <= ALLOWED, path


def test_scripts_import_shared_only():
    for path in ROOT.glob("*.py"):
        foreign = {name for name in imported(path.read_text()) if name.partition(".")[0] != "shared"}
        assert foreign <= ({"accuracy.analysis"} if path.stem == "accuracy_analysis" else set()), path


def test_every_command_is_there_and_in_the_table():
    named = set(re.findall(r"python -m benchmarks\.(\w+)", (ROOT / "README.md").read_text()))
    for name in named:
        assert importlib.util.find_spec(f"benchmarks.{name}"), name
    runs = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    scripts = {path.stem for path in ROOT.glob("*.py") if runs.search(path.read_text())}
    assert named == scripts | set(ROOMS)
    for room in ROOMS:
        assert (ROOT / room / "__main__.py").is_file()
