"""What a case is compared with, and what the command makes of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kernel_lab.ptx import checking, command, report
from kernel_lab.ptx.cases import OPS, Case, Op, cases
from kernel_lab.ptx.cases.case import FP32, INT32

ROOT = Path(__file__).parents[3]
SMALL = next(case for case in cases() if str(case) == "score_topk fp32 [9, 5] rows random groups 3 k=3")


@triton.jit
def _in_order_of_arrival(count_ptr, out_ptr):
    program = tl.program_id(0)
    tl.store(out_ptr + tl.atomic_add(count_ptr, 1, sem="relaxed"), program)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case whose result says in which order programs came: no access is wrong, and yet it is no result."""

    def prepare(count, out):
        return lambda: _in_order_of_arrival[(6,)](count, out)

    def reference(count, out):
        count += 6
        out.copy_(torch.arange(6))

    monkeypatch.setitem(OPS, "arrivals", Op(prepare, reference))
    tensors = torch.zeros(1, dtype=INT32), torch.zeros(6, dtype=INT32)
    return Case("arrivals", "six", FP32, lambda: tuple(t.clone() for t in tensors), lambda a: 28, lambda a: 6)


def test_dependence_on_the_order_of_programs(arrivals: Case) -> None:
    assert not checking.check(arrivals, "sm_90", all_orders=False).problems
    first, second = checking.check(arrivals, "sm_90").problems
    assert first.startswith("depends on the order of programs (last to first, one by one): 6 of 6 numbers")
    assert second.startswith("depends on the order of programs (shuffled)")


def test_a_repeated_launch_that_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = OPS[SMALL.op]

    def prepare(W, a, k):
        perform = op.prepare(W, a, k)

        def twice():
            calls.append(1)
            return perform() + (len(calls) > 1)

        return twice

    monkeypatch.setitem(OPS, SMALL.op, Op(prepare, op.reference))
    (problem,) = checking.check(SMALL, "sm_90", all_orders=False).problems
    assert problem == "a repeated launch gives other bits: 27 of 27 numbers of tensor 2 [9, 3]"


def test_a_result_that_is_not_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[SMALL.op]
    monkeypatch.setitem(OPS, SMALL.op, replace(op, reference=lambda *arguments: op.reference(*arguments).flip(1)))
    (problem,) = checking.check(SMALL, "sm_90", all_orders=False).problems
    assert problem.startswith("DIFFERS from the reference by ")


def test_what_the_machine_does_not_know_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*arguments):
        raise NotImplementedError("tcgen05.mma")

    monkeypatch.setitem(OPS, SMALL.op, replace(OPS[SMALL.op], prepare=prepare))
    assert checking.check(SMALL, "sm_90").problems == ["NOT COVERED by the machine: tcgen05.mma"]


def test_deviations() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.0, nan, inf, 4.0])
    assert checking.deviation([x], [x.clone()]) == 0
    assert checking.deviation([x + torch.tensor([0, 0, 0, 0.5])], [x]) == 0.125
    for wrong in ([nan, nan, inf, 4.0], [1.0, 1.0, inf, 4.0], [1.0, nan, -inf, 4.0]):
        assert checking.deviation([torch.tensor(wrong)], [x]) == inf
    assert checking.deviation([x[:3]], [x]) == inf


def test_the_command(capsys, tmp_path, monkeypatch) -> None:
    file = tmp_path / "figures.json"
    chosen = ["--only", "score_topk", "--match", "fp32 [9, 5] rows random groups 3 k=3", "--capability", "90", "--notes"]
    assert command.main([*chosen, "--json", str(file)]) == 0
    line, _, _header, row, _, total = capsys.readouterr().out.strip().split("\n")
    assert line.startswith(
        "sm_90 score_topk fp32 [9, 5] rows random groups 3 k=3 | select_in_registers | 1 programs | exact"
    )
    assert row.split()[:4] == ["score_topk", "fp32", "sm_90", "1"]
    assert total.startswith("1 cases, 0 with problems")
    content = json.loads(file.read_text())
    assert content["command"].startswith("python -m kernel_lab.ptx --only score_topk")
    (figures,) = content["cases"]
    assert figures["least_bytes"] == 9 * 5 * 4 + 3 * 5 * 4 + 9 * 3 * 4
    assert figures["unique_bytes"] >= figures["least_bytes"]
    monkeypatch.setattr(command, "cases", lambda: [replace(SMALL, tolerance=-1.0)])
    assert command.main(chosen) == 1
    assert "    DIFFERS from the reference by 0" in capsys.readouterr().out
    assert command.main(["--only", "nothing"]) == 1


def test_where_traffic_goes() -> None:
    """By kernel and line, the lines with most sectors first."""
    checked = checking.check(SMALL, "sm_90", all_orders=False)
    head, *lines = report.traffic(checked.launched).split("\n")
    assert head.strip().startswith("_select_in_registers: 1 programs, ")
    sectors = [int(line.split(": ")[1].split()[0]) for line in lines if "requests" in line]
    assert sectors == sorted(sectors, reverse=True)
    assert sum(sectors) == checked.launched[0].sectors("load", "store", "atomic")
    assert any("topk.py:" in line and "instructions: " in line for line in lines)


def test_several_processes_tell_the_same(capsys) -> None:
    chosen = ["--only", "score_topk", "--match", "fp32 [9, 5] rows random groups 3", "--one-order"]

    def told(out: str) -> list[str]:
        return [line.rpartition(" | ")[0] for line in out.split("\n") if " | " in line]

    assert command.main([*chosen, "--jobs", "1"]) == 0
    here = told(capsys.readouterr().out)
    ran = [sys.executable, "-m", "kernel_lab.ptx", *chosen, "--jobs", "2"]
    done = subprocess.run(ran, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert told(done.stdout) == here
    assert len(here) == 6
