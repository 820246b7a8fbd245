"""Building and installing the package: with a compiler, and on a machine that has none."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = "fps_kernels/libfps_kernels.so"
USE = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fps_kernels import ops
    for _ in range(3):
        columns = ops.score_topk(torch.tensor([[1.0, -3.0, 2.0]]), torch.ones(3), 2)
        ops.column_norm_(torch.ones(4, 3), torch.zeros(3, dtype=torch.float64), 1.0)
warned = [str(w.message) for w in caught if "reference" in str(w.message)]
print(ops.backend_for("score_topk", "cpu"), columns.tolist(), warned)
"""


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder (not in this checkout, which Python would import the package from)."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        folder,
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder),
        *("--config-settings", f"build-dir={folder / 'build'}", ROOT),
        **environment,
    )


def install(wheel: Path, folder: Path) -> None:
    installed = run(folder, sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder / "installed", wheel)
    assert installed.returncode == 0, installed.stderr


def use_installed(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ops of the package that :func:`install` put into a folder."""
    # Without `site` an editable install of this checkout does not come first.
    path = os.pathsep.join((str(folder / "installed"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    return run(folder, sys.executable, "-S", "-c", USE, PYTHONPATH=path, **environment)


def test_wheel_without_a_compiler_works_on_the_reference_backend(tmp_path: Path) -> None:
    built = build_wheel(tmp_path, CXX="/nonexistent/c++", FPS_REQUIRE_NATIVE="0")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()

    install(wheel, tmp_path)
    used = use_installed(tmp_path, FPS_REQUIRE_NATIVE="0")
    assert used.stdout.startswith("reference [[1, 2]]"), used.stderr
    assert used.stdout.count("Reinstall with a C++ compiler") == 1

    required = use_installed(tmp_path, FPS_REQUIRE_NATIVE="1")
    assert required.returncode != 0
    assert "FPS_REQUIRE_NATIVE=1, but libfps_kernels.so was not built" in required.stderr


def test_required_native_fails_to_build_without_a_compiler(tmp_path: Path) -> None:
    built = build_wheel(tmp_path, CXX="/nonexistent/c++", FPS_REQUIRE_NATIVE="1")
    assert built.returncode != 0
    assert "FPS_REQUIRE_NATIVE=1, but there is no working C++ compiler" in built.stdout + built.stderr


def test_sdist_builds_one_wheel_for_every_python_which_runs_outside_the_repository(tmp_path: Path) -> None:
    backend = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    made = run(ROOT, sys.executable, "-c", backend, tmp_path)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("fps_kernels_torch-*.tar.gz")
    with tarfile.open(archive) as file:
        names = file.getnames()
    for needed in ("csrc/CMakeLists.txt", "fps_kernels/py.typed", "fps_kernels/demo/digits_vit.safetensors", "LICENSE"):
        assert any(name.endswith(needed) for name in names), needed
    assert not [
        name for name in names if any(f"/{room}/" in name for room in ("tests", "benchmarks", "kernel_lab", ".venv"))
    ]

    # Unoptimised, which compiles in a quarter of the time: the rest of the suite runs the build that is installed.
    quick = ("--config-settings", "cmake.build-type=Debug")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        *quick,
        "--wheel-dir",
        tmp_path,
        archive,
    )
    built = run(tmp_path, *pip, FPS_REQUIRE_NATIVE="1")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*-py3-none-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert not [name for name in names if name.startswith(("csrc/", "tests/", "benchmarks/", "kernel_lab/"))]
    # An empty environment that sees the packages it depends on, but not this checkout.
    assert run(tmp_path, sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty").returncode == 0
    python = tmp_path / "empty" / "bin" / "python"
    site = next((tmp_path / "empty" / "lib").glob("python3*")) / "site-packages"
    install(wheel, tmp_path)
    (site / "paths.pth").write_text(f"{tmp_path / 'installed'}\n")
    used = run(tmp_path, python, "-c", USE, FPS_REQUIRE_NATIVE="1", PYTHONPATH=sysconfig.get_path("purelib"))
    assert used.stdout == "native [[1, 2]] []\n", used.stderr
    entry = "import sys, fps_kernels.cli as c; sys.argv = ['fps-kernels', 'doctor']; c.main()"
    doctor = run(tmp_path, python, "-c", entry, PYTHONPATH=sysconfig.get_path("purelib"))
    assert doctor.returncode == 0, doctor.stderr
    assert "self-test" in doctor.stdout
    where = run(
        tmp_path, python, "-c", "import fps_kernels; print(fps_kernels.__file__)", PYTHONPATH=sysconfig.get_path("purelib")
    )
    assert str(tmp_path / "installed") in where.stdout
