"""The linter of imports: it holds, and it sees what it is there to see."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """``lint-imports`` in a folder that holds the packages; without ``site``, so that no editable install comes first."""
    path = os.pathsep.join((str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    return subprocess.run(
        [sys.executable, "-S", "-c", LINT, "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for package in ("fps_kernels", "kernel_lab", "benchmarks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copied: Path) -> None:
    found = lint(copied)
    assert found.returncode == 0, found.stdout
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "planted", "broken"),
    [
        ("fps_kernels/ops/norms.py", "from fps_kernels.weights import matrix", "No room imports one above it"),
        ("fps_kernels/choosing/select.py", "from fps_kernels.tuning import tuner", "No room imports one above it"),
        ("fps_kernels/weights/kinds/linear.py", "from fps_kernels.weights import survey", "Kinds of weights know nothing"),
        ("fps_kernels/selection/selection.py", "import rich", "no library of models, commands or tables"),
        ("kernel_lab/cases.py", "from fps_kernels.choosing import select", "The kernel laboratory looks at the ops alone"),
        ("fps_kernels/ops/reference.py", "import kernel_lab", "needs neither its laboratory nor its benchmarks"),
    ],
)
def test_a_planted_import_is_seen(copied: Path, module: str, planted: str, broken: str) -> None:
    with (copied / module).open("a") as file:
        file.write(f"\n{planted}\n")
    found = lint(copied)
    assert found.returncode == 1, found.stdout
    assert any(broken in line and "BROKEN" in line for line in found.stdout.splitlines()), found.stdout


def test_a_room_that_no_layer_names_is_refused(copied: Path) -> None:
    (copied / "fps_kernels" / "misc.py").write_text('"""A drawer."""\n')
    found = lint(copied)
    assert found.returncode == 1, found.stdout
    assert "fps_kernels.misc" in found.stdout + found.stderr


def test_files_are_short_and_the_root_is_empty() -> None:
    """One idea each; at the root the public names and the version, nothing else."""
    assert {path.name for path in (ROOT / "fps_kernels").glob("*.py")} == {"__init__.py", "_version.py"}
    sources = [
        path
        for folder in ("fps_kernels", "kernel_lab", "benchmarks", "tests", "csrc")
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert len(sources) > 100
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > 400}
    assert not long
