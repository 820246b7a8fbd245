"""Every Triton kernel, exactly as the ops launch it, compiled for GPUs that need not be there.

A process of its own: one that interprets Triton cannot compile.
"""

import re

import pytest
import torch
import triton

from fps_kernels.ops.triton import digits
from kernel_lab import cases, compilation

CASES = {case.name: case for case in cases.cases()}
SHARED_LIMIT = 48 * 1024  # bytes that every target grants a program without asking; gfx942 has 64 KiB
# Triton 3.9 packs sixteen truth values into 16 bits through two bytes of stack, where 3.8 used none; frames come by 8 bytes.
STACK_LIMIT = 8
# Not `redux`, by which lanes find their least or largest float without memory, in whatever order.
FLOAT_ATOMICS = re.compile(r"\b(?:atom|red)\.[\w.:]*\.b?f(?:16|32|64)")
# Tiles of both factors, several of each on their way while others are multiplied: what the target grants when asked.
MULTIPLYING = {"_product"}
# Kernels that stream a matrix; the others read a few partial sums or gather.
STREAMING = {
    "_partial_norms",
    "_pixel_sums",
    "_argmax",
    "_select_in_registers",
    "_select_by_passes",
    "_histogram",
    "_count_rows",
    "_fill_rows",
    "_product",
    "_pack_groups",
}
SCORING = STREAMING - {"_partial_norms", "_pixel_sums", "_product", "_pack_groups"}


@pytest.mark.parametrize("target", list(compilation.TARGETS))
@pytest.mark.parametrize("name", list(CASES))
def test_compiles_well(name, target):
    """No register spilled, little shared memory, and 16-byte loads wherever the input is contiguous and aligned."""
    case = CASES[name]
    launches = compilation.record(target, case.op, *case.arguments)
    assert launches
    for launch in launches:
        needs = compilation.resources(launch)
        assert needs.spilled == 0, launch.name
        assert dict(launch.options)["enable_fp_fusion"] is False, launch.name  # whatever this Triton's default is
        assert needs.stack <= STACK_LIMIT, launch.name
        assert needs.shared <= (compilation.SHARED_LIMITS[target] if launch.name in MULTIPLYING else SHARED_LIMIT), (
            launch.name
        )
        assert needs.registers <= 255, launch.name
        # Two results in different orders must never meet: a mask would fall on other elements than its own.
        assert needs.reorderings <= 1, launch.name
        # A program of four wavefronts of 64 has less than 16 bytes a lane of what is a tile for four warps.
        if case.wide and launch.name in STREAMING and not (target == "gfx942" and launch.name == "_pixel_sums"):
            assert needs.wide_loads, launch.name
        if target != "gfx942":
            check_arithmetic(launch.name, needs.assembly)


def check_arithmetic(kernel: str, ptx: str) -> None:
    """What exact agreement between backends rests on."""
    float_atomics = FLOAT_ATOMICS.findall(ptx)
    assert not float_atomics, f"{kernel} adds floats in an order of chance"
    if kernel in SCORING:
        assert ".ftz" not in ptx, f"{kernel} flushes small scores to zero"
        assert "fma.rn.f32" not in ptx, f"{kernel} fuses the product of a score"
        assert "mul.rn.f32" in ptx or "mul.f32" in ptx


def test_float_atomics_are_told_from_exchanges_of_lanes():
    for line in (
        "@%p1 atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;",
        "red.relaxed.gpu.global.add.noftz.bf16x2 [%rd1], %r2;",
        "\tred.global.add.f64 [%rd1], %rd2;",
        "atom.global.gpu.relaxed.add.noftz.f16 %rs1, [%rd1], %rs2;",
    ):
        assert FLOAT_ATOMICS.search(line), line
    for line in (
        "redux.sync.min.f32 %r1, %r2, -1;",
        "redux.sync.max.NaN.f32 %r1, %r2, -1;",
        "atom.global.gpu.relaxed.add.u32 %r1, [%rd1], %r2;",
    ):
        assert not FLOAT_ATOMICS.search(line), line


def test_every_kernel_is_covered_and_says_what_it_implements():
    launched = {launch.name for case in CASES.values() for launch in compilation.record("sm_90", case.op, *case.arguments)}
    documented = {
        name
        for family in compilation.FAMILIES
        for name, value in vars(family).items()
        if isinstance(value, triton.runtime.JITFunction) and "reference." in (value.fn.__doc__ or "")
    }
    assert launched == documented


def test_a_pass_over_many_tensors_is_one_launch():
    weights = cases.vit_weights(12, 768, torch.bfloat16)
    factors = [cases.tensor(1, W.shape[1]) for W in weights]
    names = [launch.name for launch in compilation.record("sm_90", cases.backend.score_kth, weights, factors, 1000)]
    assert names == ["_histogram", "_choose_digit"] * len(digits.BITS) + ["_counts"]
    step = CASES["masked_adamw ViT-B/16, 1 %, fp32, dense gradients"]
    assert [launch.name for launch in compilation.record("sm_90", step.op, *step.arguments)] == ["_masked_adamw"]
