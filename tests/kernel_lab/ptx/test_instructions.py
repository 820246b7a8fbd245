"""What instructions compute, beside NumPy, exact arithmetic or torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from kernel_lab.ptx.arithmetic import fused_multiply_add
from kernel_lab.ptx.decoding import decode
from kernel_lab.ptx.warpgroups import operand_offsets
from tests.kernel_lab.ptx.programs import launch, numbers


def compute(lines: str, x: torch.Tensor) -> torch.Tensor:
    """``%r4`` of ``%r3``, 32 numbers of 32 bits."""
    y = torch.empty(32, dtype=torch.int32)
    assert not launch(f"ld.global.b32 %r3, [%rd4]; {lines} st.global.b32 [%rd5], %r4;", x, y).findings.counts
    return y


def _bits(votes: torch.Tensor) -> torch.Tensor:
    return (votes.long() << torch.arange(32)).sum()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("div.s32 %r4, %r3, 3;", lambda x: torch.div(x, 3, rounding_mode="trunc")),
        ("rem.s32 %r4, %r3, 3;", lambda x: torch.fmod(x, 3)),
        ("shr.s32 %r4, %r3, 40;", lambda x: (x < 0) * -1),
        ("shr.u32 %r4, %r3, 32;", lambda x: x * 0),
        ("shl.b32 %r4, %r3, 31;", lambda x: (x & 1) * -(2**31)),
        ("bfe.s32 %r4, %r3, 2, 3;", lambda x: ((x >> 2) & 7) - ((x >> 2) & 4) * 2),
        ("bfe.u32 %r4, %r3, 2, 3;", lambda x: (x >> 2) & 7),
        ("prmt.b32 %r4, %r3, 0, 0x0123;", lambda x: torch.from_numpy(x.numpy().byteswap())),
        ("prmt.b32 %r4, %r3, 0, 0x4449;", lambda x: ((x >> 8 & 255) > 127) * 255),
        ("mul.lo.s32 %r4, %r3, -7;", lambda x: x * -7),
        ("min.s32 %r4, %r3, 2;", lambda x: x.clamp(max=2)),
        ("popc.b32 %r4, %r3;", lambda x: torch.tensor([bin(n % 2**32).count("1") for n in x.tolist()])),
        ("setp.lt.s32 %p1, %r3, 2; selp.b32 %r4, 1, 5, %p1;", lambda x: torch.where(x < 2, 1, 5)),
        ("setp.lt.u32 %p1, %r3, 2; selp.b32 %r4, 1, 5, %p1;", lambda x: torch.where((x >= 0) & (x < 2), 1, 5)),
        ("mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r4, {%rs2, %rs1};", lambda x: (x << 16) | (x >> 16 & 0xFFFF)),
        ("cvt.s64.s32 %rd6, %r3; shr.s64 %rd6, %rd6, 32; cvt.u32.u64 %r4, %rd6;", lambda x: (x < 0) * -1),
        ("cvt.u64.u32 %rd6, %r3; shr.s64 %rd6, %rd6, 32; cvt.u32.u64 %r4, %rd6;", lambda x: x * 0),
        ("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;", lambda x: x[torch.arange(32) ^ 5]),
        ("shfl.sync.up.b32 %r4, %r3, 3, 0, -1;", lambda x: x[[0, 1, 2, *range(29)]]),
        ("shfl.sync.idx.b32 %r4, %r3, 9, 31, -1;", lambda x: x[9].expand(32)),
        ("redux.sync.max.s32 %r4, %r3, -1;", lambda x: x.max().expand(32)),
        ("setp.lt.s32 %p1, %r3, 2; vote.sync.ballot.b32 %r4, %p1, -1;", lambda x: _bits(x < 2).expand(32)),
    ],
)  # fmt: skip
def test_integers(lines: str, expected) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (32,)).int()
    x[:4] = torch.tensor([-5, 5, -1, 2**31 - 1])
    assert torch.equal(compute(lines, x), expected(x).int())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ne", lambda x: (x < 1) | (x > 1)),  # NaN is not "unequal"
        ("neu", lambda x: x != 1),
        ("lt", lambda x: x < 1),
        ("ltu", lambda x: ~(x >= 1)),
        ("nan", lambda x: x.isnan()),
        ("num", lambda x: ~x.isnan()),
    ],
)
def test_comparisons_with_nan(name: str, expected) -> None:
    x = torch.tensor([float("nan"), 1.0, 0.0, 2.0] * 8)
    found = compute(f"setp.{name}.f32 %p1, %r3, 0f3F800000; selp.b32 %r4, 1, 0, %p1;", x)
    assert torch.equal(found.bool(), expected(x))


def test_conversions() -> None:
    x = torch.randn(32) * 100
    x[:3] = torch.tensor([float("nan"), 1 + 2.0**-9, 65520.0])
    half = compute("cvt.rn.f16.f32 %rs1, %r3; mov.b16 %rs2, 0; mov.b32 %r4, {%rs1, %rs2};", x)
    assert torch.equal(half.short().view(torch.float16).nan_to_num(7), x.half().nan_to_num(7))
    pair = compute("cvt.rn.bf16x2.f32 %r4, %r3, 0f00000000;", x)
    assert torch.equal((pair >> 16).short().view(torch.bfloat16).nan_to_num(7), x.bfloat16().nan_to_num(7))
    tf32 = compute("cvt.rna.tf32.f32 %r4, %r3;", x)
    assert ((tf32 & 0x1FFF) == 0)[1:].all()
    assert ((tf32.view(torch.float32) - x).abs() <= x.abs() * 2.0**-11)[1:].all()


def test_a_fused_product_is_rounded_once() -> None:
    """Also where the sum in float64 lies halfway between two float32."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(500).astype(np.float32)
    b = rng.standard_normal(500).astype(np.float32)
    c = (-a * b + rng.standard_normal(500) * 2.0 ** rng.integers(-40, 2, 500)).astype(np.float32)
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80  # just above the middle of two numbers
    for x, y, z, found in zip(a, b, c, fused_multiply_add(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = found, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))
        assert min(abs(Fraction(float(n)) - exact) for n in neighbours) == abs(Fraction(float(found)) - exact)


def test_branches_meet_again() -> None:
    """A loop of a different length in each thread, then an exchange of all lanes."""
    body = """
	mov.b32 %r3, 0;
	mov.b32 %r4, 0;
$loop:
	setp.ge.s32 %p1, %r3, %r1;
	@%p1 bra $done;
	add.s32 %r4, %r4, %r3;
	add.s32 %r3, %r3, 1;
	bra.uni $loop;
$done:
	shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
	st.global.b32 [%rd4], %r5;
"""
    x = torch.zeros(32, dtype=torch.int32)
    assert not launch(body, x).kinds
    lane = torch.arange(32) ^ 1
    assert torch.equal(x, (lane * (lane - 1) // 2).int())


def test_the_stack() -> None:
    body = """
	.local .align 8 .b8 	__local_depot0[16];
	mov.b64 	%rd6, __local_depot0;
	cvta.local.u64 	%rd7, %rd6;
	st.b32 	[%rd7+8], %r1;
	ld.b32 	%r3, [%rd7+{offset}];
	st.global.b32 [%rd4], %r3;
"""
    x = torch.zeros(32, dtype=torch.int32)
    assert not launch(body.format(offset=8), x).kinds
    assert torch.equal(x, numbers())
    assert launch(body.format(offset=16), x).kinds == ["stack access out of bounds"]


def test_least_and_largest_floats() -> None:
    """NaN loses to any number, and of two zeros the sign counts."""
    values = [0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-42, -3.5]
    x = torch.tensor([values[i % 8] for i in range(32)])
    y = torch.tensor([values[i // 8 + i % 3] for i in range(32)])

    def found(name: str) -> torch.Tensor:
        out = torch.empty(32, dtype=torch.int32)
        lines = f"ld.global.b32 %r3, [%rd4]; ld.global.b32 %r4, [%rd5]; {name}.f32 %r5, %r3, %r4; st.global.b32 [%rd5], %r5;"
        out.copy_(y.view(torch.int32))
        assert not launch(lines, x.view(torch.int32), out).findings.counts
        return out

    for name, sign in (("min", 1), ("max", -1)):
        wanted = []
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            numbers_ = [v for v in (a, b) if v == v]
            # -0 before 0
            wanted.append(
                sorted(numbers_, key=lambda v: (sign * v, sign * math.copysign(1, v)))[0] if numbers_ else math.nan
            )
        both = torch.tensor(wanted)
        mine = found(name).view(torch.float32)
        assert torch.equal(mine.isnan(), both.isnan())
        assert torch.equal(mine[~both.isnan()].view(torch.int32), both[~both.isnan()].view(torch.int32))


def test_floats_become_integers_towards_zero() -> None:
    x = torch.tensor([2.7, -2.7, 3e9, -3e9, float("nan"), float("inf"), 0.0, -0.5] * 4)
    y = torch.empty(32, dtype=torch.int32)
    lines = "ld.global.b32 %r3, [%rd4]; cvt.rzi.s32.f32 %r4, %r3; st.global.b32 [%rd5], %r4;"
    assert not launch(lines, x.view(torch.int32), y).findings.counts
    assert y.tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0, 0] * 4


def test_unknown_instructions_are_refused_by_name() -> None:
    for line in (
        "tcgen05.mma %r3;",
        "min.NaN.f32 %r3, %r1, %r2;",
        "cvt.rni.s32.f32 %r3, %r1;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
    ):
        with pytest.raises(NotImplementedError, match=line.split()[0].replace(".", r"\.")):
            launch(line, numbers())
    with pytest.raises(ValueError, match="no kernel in the PTX"):
        decode("// nothing")


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_operands_of_a_product_lie_apart(mode: int) -> None:
    """Each number of a factor has a place of its own, within the rows that its descriptor names."""
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    stride = 8 * width
    descriptor = (mode << 62) | ((stride >> 4) << 32) | ((64 * stride >> 4) << 16)
    offsets = operand_offsets(descriptor, 64, 16, 2, True)
    assert offsets.shape == (64, 16)
    assert len(np.unique(offsets)) == 64 * 16
    assert (offsets % 2 == 0).all()
