"""A product of a warpgroup from shared memory, and what must not happen while it is in flight."""

import pytest
import torch

from tests.kernel_lab.ptx.programs import Ran, launch

WORDS = 640  # of 4 bytes, five for each thread: A [64, 16] at 0 and B [8, 16] at 2048 bytes
A, B = 0, 2048
LOAD = "".join(f"ld.global.b32 %r3, [%rd4+{512 * i}]; st.shared.b32 [%r4+{512 * i}], %r3;\n" for i in range(5))
PRODUCT = """
	shl.b32 %r4, %r1, 2;
	{load}
	fence.proxy.async.shared::cta;
	bar.sync 0;
	mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
	mov.b64 %rd6, {a};
	mov.b64 %rd7, {b};
	mov.pred %p1, 0;
	{before}
	wgmma.fence.sync.aligned;
	{guard} wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10,%r11,%r12,%r13}}, %rd6, %rd7, %p1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	{meanwhile}
	wgmma.wait_group.sync.aligned {pending};
	mul.wide.u32 %rd3, %r1, 16;
	add.s64 %rd8, %rd2, %rd3;
	st.global.v4.b32 [%rd8], {{%r10,%r11,%r12,%r13}};
"""


def descriptor(start: int, leading: int = 128, stride: int = 256) -> int:
    """Without swizzle: 8 rows of 16 bytes lie together."""
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32


def multiply(
    a: int | None = None, before: str = "", guard: str = "", meanwhile: str = "", pending: int = 0
) -> tuple[Ran, torch.Tensor, torch.Tensor]:
    """What happened, the product ``[64, 8]``, and what it should be."""
    left, right = torch.randn(64, 16).half(), torch.randn(8, 16).half()
    blocks = [x.view(-1, 8, 2, 8).transpose(1, 2).flatten() for x in (left, right)]  # [rows / 8, columns / 8, 8, 8]
    memory = torch.zeros(2 * WORDS, dtype=torch.float16)
    memory[:1024], memory[1024:1152] = blocks
    out = torch.zeros(128, 4)
    where = {"a": descriptor(A) if a is None else a, "b": descriptor(B)}
    body = PRODUCT.format(load=LOAD, before=before, guard=guard, meanwhile=meanwhile, pending=pending, **where)
    ran = launch(body, memory.view(torch.int32), out, warps=4, shared=4 * WORDS)
    product = out.view(4, 8, 4, 2, 2).permute(0, 3, 1, 2, 4).reshape(64, 8)  # [warp, row, pair, upper, number]
    return ran, product, left.float() @ right.float().t()


def test_a_product() -> None:
    ran, product, expected = multiply()
    assert not ran.findings.counts
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"pending": 1}, "register of a wgmma in flight"),
        ({"meanwhile": "mov.b32 %r3, %r11;"}, "register of a wgmma in flight"),
        ({"meanwhile": "st.shared.b32 [%r4], %r1;"}, "write to an operand of a wgmma in flight"),
        (
            {"before": "cvt.u64.u32 %rd9, %r1; add.s64 %rd6, %rd6, %rd9;"},
            "threads of a warpgroup have different descriptors",
        ),
        ({"before": "setp.lt.u32 %p2, %r1, 64;", "guard": "@%p2"}, "wgmma without its whole warpgroup"),
        ({"a": descriptor(1024)}, "shared read out of bounds"),
    ],
)
def test_what_must_not_happen(change: dict[str, str | int], kind: str) -> None:
    ran, _, _ = multiply(**change)
    assert kind in ran.kinds
