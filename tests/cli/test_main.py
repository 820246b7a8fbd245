"""The command line as a whole: start, help, exit codes, options from a file."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import fps_kernels as fps
from fps_kernels import ops
from tests.cli.running import cli, output

COMMANDS = ("select", "tune", "evaluate", "predict", "export", "apply", "inspect", "compare", "plan", "demo", "doctor")


def test_help_imports_no_network_library():
    program = (
        "import sys; sys.argv = ['fps-kernels', '--help']\n"
        "from fps_kernels.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "heavy = ['timm', 'torchvision', 'transformers', 'plotly', 'sklearn', 'tensorboard', 'torch._dynamo']\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    baseline = "import sys, torch; print([n for n in ['torch._dynamo'] if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    plain = subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == plain.stdout.strip()
    assert all(f" {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: fps-kernels {command}" in output(command, "--help")


def test_a_missing_package_names_what_brings_it(tmp_path):
    (tmp_path / "options.yaml").write_text("json: true")
    for package, arguments, message in (
        ("typer", ["--help"], "the command line needs typer: pip install typer"),
        (
            "yaml",
            ["doctor", "--config", tmp_path / "options.yaml"],
            "--config needs yaml: pip install pyyaml",
        ),
        ("timm", ["plan", "test_vit"], "timm"),
    ):
        with mock.patch.dict(sys.modules, {package: None}):
            done = cli(*arguments)
        assert done.code == 2
        assert message in done.message, done.message
    with mock.patch.dict(sys.modules, {"timm.data": None}):
        sys.modules.pop("fps_kernels.runs.splits", None)  # which imports it
        sys.modules.pop("fps_kernels.runs.choice", None)
        done = cli("select", "test_vit", "--data", tmp_path, "--output", tmp_path / "s")
    assert done.code == 2
    assert "the command needs timm: pip install timm" in done.message


def test_the_version():
    assert output("--version") == f"{fps.__version__}\n"


def test_no_command_shows_the_help():
    done = cli()
    assert done.code == 2
    assert "Usage: fps-kernels" in done.out + done.err


def test_a_reader_that_goes_away_is_told_nothing(tmp_path):
    mask = torch.ones(2, 2, dtype=torch.bool)
    path = tmp_path / "s.safetensors"
    fps.Selection.from_masks({f"layers.{i}.{'n' * 80}": mask for i in range(2000)}).save(path)
    command = f"{sys.executable} -c 'from fps_kernels.cli import main; main()' inspect {path} --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("{", "")


def test_a_mistake_of_ours_shows_where(monkeypatch):
    """Only what a user can mend is told in one line."""

    def broken(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(ops, "backend_for", broken)
    with pytest.raises(LookupError, match="a bug"):
        cli("doctor")


def test_an_interruption(monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "backend_for", interrupted)
    done = cli("doctor")
    assert done.code == 130
    assert "Traceback" not in done.err


def test_doctor(monkeypatch):
    found = json.loads(output("doctor", "--json"))
    assert found["self-test"]["cpu"] == "passed"
    assert set(found["backends"]["cpu"].values()) == {fps.backend_for("score_topk", "cpu")}
    assert "self-test: cpu passed" in output("doctor")
    assert "conflict" not in found
    monkeypatch.setattr(ops, "score_topk", lambda W, a, k: torch.zeros(W.shape[0], k, dtype=torch.int32))
    failed = cli("doctor")
    assert failed.code == 1
    assert "cpu FAILED" in failed.out


def test_doctor_notices_the_other_distribution(tmp_path, monkeypatch):
    """PyPI has an unrelated fps-kernels whose import package has the name of this one."""
    metadata = tmp_path / "fps_kernels-0.11.6.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fps-kernels\nVersion: 0.11.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert json.loads(output("doctor", "--json"))["conflict"].startswith("fps-kernels 0.11.6 is installed, another project")
    assert "conflict: fps-kernels 0.11.6" in output("doctor")


# ------------------------------------------------------------------------------------------------ --config


def written(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text)
    return path


def test_options_from_a_file(tmp_path):
    path = written(tmp_path, "model: test_vit\nbatch-size: 3\nmethod: [forward, attach]\njson: true\n")
    costs = json.loads(output("plan", "--config", path))
    assert [(c["method"], c["batch_size"]) for c in costs] == [("forward", 3), ("attach", 3)]
    costs = json.loads(output("plan", "--config", path, "--batch-size", 2, "--method", "FPS"))
    assert [(c["method"], c["batch_size"]) for c in costs] == [("FPS", 2)]
    path = written(tmp_path, "batch_size: 1\nmethod: forward\n")  # underscores will do, and one value for a list
    costs = json.loads(output("plan", "test_vit", "--json", "--config", path))
    assert [(c["method"], c["batch_size"]) for c in costs] == [("forward", 1)]
    assert cli("doctor", "--config", written(tmp_path, "# nothing\n")).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bacth-size: 3", "plan has no option 'bacth-size': did you mean 'batch-size'?"),
        ("zzz: 3", "plan has no option 'zzz': its options are "),
        ("config: other.yaml", "plan has no option 'config'"),
        ("batch-size: many", "Invalid value for '--batch-size'"),
        ("batch-size: [1, 2]", "batch-size takes one value, not a list"),
        ("batch-size: {a: 1}", "batch-size takes a value, not a mapping"),
        ("- a\n- b", "must map options to values"),
        ("a: [", "is no YAML file"),
        ("a: !!python/object/apply:os.getcwd []", "is no YAML file"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    done = cli("plan", "test_vit", "--config", written(tmp_path, text))
    assert done.code == 2
    assert message in done.message


def test_a_file_that_is_missing(tmp_path):
    done = cli("doctor", "--config", tmp_path / "none.yaml")
    assert done.code == 2
    assert "does not exist" in done.message


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["tune", "--help"], ["plan", "--help"], ["nonsense"]])
def test_help_needs_no_torch(arguments):
    """Which takes seconds to import."""
    program = (
        "import sys; sys.argv = ['fps-kernels', *sys.argv[1:]]; from fps_kernels.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
