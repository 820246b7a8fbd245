"""The one-command GPU check: every path that needs no GPU, and what it says of a check that fails."""

import json
import sys

import pytest
import torch

from benchmarks.gpu_check import command
from benchmarks.shared.device_timing import Bench


def test_every_check_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Bench, "__init__", _short)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--quick", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report["checks"]) == list(command.CHECKS)
    assert all(check["rows"] for check in report["checks"].values())
    text = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {name}" in text for name in command.CHECKS)
    assert "FAILED" not in text


def _short(self: Bench, device: torch.device, rounds: int, warmup: int) -> None:
    self.device, self.rounds, self.warmup = device, 2, 0


def test_a_failing_check_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(bench: Bench, quick: bool) -> command.Rows:
        raise RuntimeError("the kernel said | no")

    monkeypatch.setattr(command, "CHECKS", {"broken": broken, "fine": lambda bench, quick: [{"a": 1.5}]})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [check["passed"] for check in report["checks"].values()] == [False, True]
    assert "the kernel said | no" in report["checks"]["broken"]["error"]
    assert "**FAILED**" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
