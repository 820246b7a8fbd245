"""The one-command GPU check: what it does with its minutes, and what is left of it when a check, or all of it, is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import command, report, worker
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.rows import NEEDS_GPU, Check, attempt

ROOT = Path(__file__).parents[3]

# A worker in place of ours, told by the name of the check what to do.
WORKER = """
import json, os, sys, time
name, _, rows = sys.argv[1:4]
with open(rows, "w") as file:
    file.write(json.dumps({"hardware": {"gpu": "a | pretended one"}}) + "\\n" + json.dumps({"what": "first"}) + "\\n")
    file.flush()
    if name == "crashes":
        print("the last words", flush=True)
        os.abort()
    if name == "fails":
        raise RuntimeError("CUDA error: an illegal memory access")
    if name == "hangs":
        file.write('{"what": "sec')  # a row that is not whole
        file.flush()
        time.sleep(60)
    file.write(json.dumps({"what": "second"}) + "\\n")
"""


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Checks that do what their names say, in processes like the real ones."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    made = {name: Check(None, 2.0 if name == "hangs" else 60.0) for name in ("crashes", "fails", "hangs", "passes")}
    monkeypatch.setattr(command, "CHECKS", made)
    popen = subprocess.Popen

    def started(arguments, **options):
        return popen([sys.executable, str(path), *arguments[3:]], **options)

    monkeypatch.setattr(command.subprocess, "Popen", started)
    return made


def read(folder):
    return json.loads((folder / report.JSON).read_text())


def test_a_check_that_is_lost_loses_itself_alone(checks, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    assert not command.Runner("cpu", True, list(checks), 5, folder).run()
    found = read(folder)["checks"]
    assert {name: check["status"] for name, check in found.items()} == {
        "crashes": "crashed",
        "fails": "failed",
        "hangs": "stopped",
        "passes": "passed",
    }
    first, second = {"what": "first"}, {"what": "second"}
    assert [check["rows"] for check in found.values()] == [[first], [first], [first], [first, second]]
    assert found["crashes"]["why"] == "killed by SIGABRT"
    assert "the last words" in found["crashes"]["error"]
    assert "illegal memory access" in found["fails"]["error"]
    assert found["hangs"]["why"] == "it took longer than 2 s"
    text = (folder / report.MARKDOWN).read_text()
    assert text.count("**crashed**: killed by SIGABRT") == 2
    assert "a | pretended one" in text


def test_what_does_not_fit_is_listed_as_not_run(checks, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    one = command.Runner._one

    def slow(self, name, check, seconds):
        now[0] += 50
        one(self, name, check, seconds)

    monkeypatch.setattr(command.Runner, "_one", slow)
    assert command.Runner("cpu", True, ["passes", "fails"], 1, tmp_path).run()
    found = read(tmp_path)["checks"]
    assert [(check["status"], check["why"]) for check in found.values()] == [
        ("passed", ""),
        ("not run", "no time was left"),
    ]
    assert "| fails | not run: no time was left | 0.0 |" in (tmp_path / report.MARKDOWN).read_text()


def test_a_row_that_fails_fails_its_check_and_the_next_is_measured(monkeypatch):
    def broken():
        raise ValueError("wrong | numbers")

    def lost():
        raise RuntimeError("CUDA error: device-side assert triggered")

    rows = []
    monkeypatch.setattr(
        worker,
        "CHECKS",
        {
            "it": Check(
                lambda bench, quick: (attempt({"n": n}, broken if n == 1 else lambda: {"ms": 1.0}) for n in range(3)), 1
            )
        },
    )
    assert not worker.run("it", torch.device("cpu"), True, rows.append)
    assert [row.get("ms") for row in rows] == [1.0, None, 1.0]
    assert rows[1]["failed"].startswith("ValueError: wrong | numbers (")
    with pytest.raises(RuntimeError, match="CUDA error"):  # nothing more can be measured in that process
        attempt({}, lost)


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "op suite"])
def test_every_check_runs_without_a_gpu(name):
    rows = []
    assert worker.run(name, torch.device("cpu"), True, rows.append), [row for row in rows if "failed" in row]
    assert rows
    text = report.markdown(
        {
            "command": "",
            "hardware": {},
            "checks": {name: {"status": "passed", "why": "", "seconds": 1.0, "error": "", "rows": rows}},
        }
    )
    assert text.count("\n|") >= len(rows) + 2
    if name in ("waits", "sanitizers"):
        assert text.count(NEEDS_GPU) == len(rows)


def test_killed_in_the_middle_it_leaves_what_it_had(tmp_path):
    """By SIGKILL, in the middle of a check: the report has the rows that were measured, and nothing goes on running."""
    names = ["ops against the reference", "compiled step", "waits"]  # the second has a row, and then compiles for long
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--only", *names]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found = _wait_for(lambda: read(tmp_path), lambda found: found["checks"]["compiled step"]["rows"])
        worker_id = int(_children(process.pid)[0])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = read(tmp_path)
    first, second, third = found["checks"].values()
    assert first["status"] == "passed"
    assert len(first["rows"]) == 22
    assert second["status"] == "running"
    assert second["rows"]
    assert (third["status"], third["rows"]) == ("not run", [])
    assert found["hardware"]["torch"] == torch.__version__
    assert "| compiled step | running |" in (tmp_path / report.MARKDOWN).read_text()
    _wait_for(lambda: Path(f"/proc/{worker_id}/stat").read_text() if _runs(worker_id) else "", lambda stat: not stat)


def _wait_for(look, enough):
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            found = look()
            if enough(found):
                return found
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not come to that in five minutes")


def _children(process_id):
    return Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()


def _runs(process_id):
    path = Path(f"/proc/{process_id}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_command_says_what_it_wants(monkeypatch, capsys):
    for arguments, said in (
        (["--device", "cpu", "--minutes", "0"], "--minutes must be positive, got 0"),
        (["--device", "cpu", "--only", "nothing"], "invalid choice: 'nothing'"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        with pytest.raises(SystemExit) as left:
            command.main()
        assert left.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_it_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert worker.hardware(torch.device("cpu"))["commit"] == "unknown"
