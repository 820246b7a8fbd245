"""What was noted of an interpreted launch is what it compiles to; random launches are of many kinds; failures are said."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from fps_kernels.ops.triton import topk
from kernel_lab import cases, compilation, every_launch, noting


@triton.jit
def _adds_what_it_cannot(x_ptr, N, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(x_ptr + n, tl.load(x_ptr + n, mask=n < N) & 1.5, mask=n < N)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(48, 64), (7, 1), (2**31 + 16, 3)])
def test_a_noted_launch_is_the_launch(shape, offset):
    O, C = shape
    W = torch.empty(O * C + offset, device="meta")[offset:].view(O, C)
    a, columns = torch.empty(1, C, device="meta"), torch.empty(O, 1, dtype=torch.int32, device="meta")
    (expected,) = compilation.record("sm_90", topk.launch_argmax, W, a, columns)
    options = dict(expected.options) | {"num_warps": expected.num_warps}
    constants = {name: value for name, value in expected.constants if name in ("SHARED", "BLOCK_R", "BLOCK_C")}
    line = noting.note(topk.__name__, "_argmax", (W, a, columns, O, C, C, 1, O), constants | options)
    assert every_launch.launch_of(line, "sm_90") == compilation.without_grid(expected)


def test_launches_that_are_compiled_alike_are_noted_once():
    x = torch.empty(64)
    notes = {noting.note("m", "k", (x, n, 3 * n + 5, None), {"DTYPE": tl.float32}) for n in (32, 64, 2**20)}
    assert len(notes) == 1
    assert json.loads(notes.pop())["named"] == {"DTYPE": {"dtype": "fp32"}}
    others = {noting.note("m", "k", (x[offset:], n), {}) for offset in (0, 1) for n in (1, 16, 17, 2**31, 2**31 + 1)}
    assert len(others) == 10


def test_random_launches_are_of_many_kinds():
    launches = [launch for seed in range(200) for launch in every_launch.random_launches(seed, "sm_90")]
    assert {launch.name for launch in launches} == {launch.name for launch in _all()}
    kinds = {(kind, name in launch.divisible) for launch in launches for name, kind in launch.signature}
    assert {("*fp32", False), ("*bf16", False), ("*fp16", True), ("i64", True), ("i32", False)} <= kinds
    assert any(value == 1 for launch in launches for name, value in launch.constants if name.startswith("stride"))


def _all() -> Iterator[compilation.Launch]:
    for case in cases.cases():
        yield from compilation.record("sm_90", case.op, *case.arguments)


def test_what_does_not_compile_is_said():
    line = noting.note(__name__, "_adds_what_it_cannot", (torch.empty(64), 64), {"BLOCK": 64, "num_warps": 4})
    count, failures = every_launch.compile_all([line, line], "sm_90")
    assert count == 1
    assert len(failures) == 1
    assert "_adds_what_it_cannot" in failures[0]


def test_the_plugin_notes_what_interpreted_tests_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FPS_LAUNCHES", str(tmp_path / "launches"))
    suite = [
        "tests/ops/test_triton_paths.py",
        "-k",
        "topk_of_rows_too_long",
        "-p",
        "no:cacheprovider",
        "-p",
        "kernel_lab.noting",
    ]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *suite], check=True, stdout=subprocess.DEVNULL)
    (file,) = tmp_path.glob("launches.*")
    launches = [every_launch.launch_of(line, "sm_90") for line in file.read_text().splitlines()]
    assert {launch.name for launch in launches} == {"_select_by_passes"}
