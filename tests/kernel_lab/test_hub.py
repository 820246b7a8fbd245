"""The kernels as a project for Hugging Face ``kernels``: loaded from elsewhere, without this package."""

import ast
import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from kernel_lab import hub


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "project"
    hub.write(folder)
    return folder


def test_layout(project):
    build = tomllib.loads((project / "build.toml").read_text())
    assert build["general"]["name"] == "fps-kernels"
    assert "torch-noarch" in build
    sources = {str(p.relative_to(project / "torch-ext/fps_kernels")) for p in (project / "torch-ext").rglob("*.py")}
    assert {"__init__.py", "triton/topk.py", "native.py"} <= sources
    assert "native_library.py" not in sources
    for backend in build["general"]["backends"]:
        variant = project / "build" / f"torch-{backend}"
        assert {str(p.relative_to(variant)) for p in variant.rglob("*.py")} == sources
        metadata = json.loads((variant / "metadata.json").read_text())
        assert (metadata["name"], metadata["python-depends"]) == ("fps-kernels", [])
        assert metadata["backend"] == {"type": backend}


def test_it_imports_torch_triton_and_the_standard_library_alone(project):
    for path in (project / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top in {"torch", "triton"} or top in sys.stdlib_module_names, (path, name)


PROGRAM = """
import importlib.util, os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fps_kernels":
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Absent())
def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
import torch
folder = sys.argv[1]
ops = load("one_kernel", folder)
torch.manual_seed(0)
W, a, x = torch.randn(37, 65), torch.rand(65), torch.randn(50, 65)
with ops.use_backend("triton"):
    columns = ops.score_topk(W, a, 3)
    acc = torch.zeros(65, dtype=torch.float64)
    ops.column_norm_(x, acc, 1.0)
assert torch.equal(columns.long(), (W.abs() * a).topk(3).indices.sort().values)
torch.testing.assert_close(acc, x.double().abs().sum(0), rtol=1e-5, atol=0)
print([name for name in torch._C._dispatch_get_all_op_names() if "score_topk" in name])
"""


def test_loaded_from_elsewhere(project):
    """On a CPU the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-c", textwrap.dedent(PROGRAM), str(project / "build" / "torch-cuda")],
        capture_output=True,
        text=True,
        env={"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin", "HOME": str(project)},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "fps_kernels_" in done.stdout
    assert "fps_kernels::" not in done.stdout


def test_kernels_library_reads_it(project):
    """Where it is installed: its own parsers."""
    rust = pytest.importorskip("kernels._rust")
    rust.Build.open(project)
    for backend in hub.BACKENDS:
        assert rust.Metadata.read_from_file(project / "build" / f"torch-{backend}" / "metadata.json").version == hub.VERSION


def test_written_again_and_nowhere_else(project, tmp_path):
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    hub.main([str(project)])
    assert before == {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part of it"):
        hub.write(tmp_path)


def test_an_import_from_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(hub, "sources", lambda: {"scores.py": "from fps_kernels.weights import matrix\n"})
    with pytest.raises(ValueError, match=r"ops/scores\.py imports from outside of the ops: from fps_kernels\.weights"):
        hub.package()
