"""Each fault that the machine knows, in a kernel of a few lines, beside one that is sound."""

import pytest
import torch

from tests.kernel_lab.ptx.programs import launch, numbers

LOAD = "ld.global.b32 %r3, [%rd4];"
STORE = "st.global.b32 [%rd5], %r3;"


def test_a_sound_kernel() -> None:
    x, y = numbers(), torch.zeros(32, dtype=torch.int32)
    ran = launch(LOAD + "add.s32 %r3, %r3, 5;" + STORE, x, y)
    assert not ran.findings.counts
    assert torch.equal(y, x + 5)
    assert ran.launched.read_bytes == ran.launched.written_bytes == 128
    assert ran.launched.sectors("load") == 4


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("ld.global.b32 %r3, [%rd4+4];", "global load out of bounds"),
        ("ld.global.b32 %r3, [%rd4+-4];", "global load out of bounds"),
        ("st.global.b32 [%rd4+4], %r1;", "global store out of bounds"),
        ("atom.global.gpu.relaxed.add.u32 %r3, [%rd4+128], 1;", "global store out of bounds"),
        ("ld.global.b32 %r3, [%rd1+2];", "misaligned global access"),
        ("st.shared.b32 [global_smem+1024], %r1;", "shared write out of bounds"),
        ("ld.shared.b32 %r3, [global_smem+8];", "load of uninitialised shared memory"),
        ("st.shared.b32 [global_smem+2], %r1;", "misaligned shared access"),
        ("st.shared.b32 [global_smem], %r1;", "lanes of one shared store write different values to one address"),
        ("st.global.b32 [%rd1], %r1;", "lanes of one store write different values to one address"),
    ],
)
def test_one_access(body: str, kind: str) -> None:
    assert kind in launch(body, numbers()).kinds


def test_what_lies_between_the_elements_of_a_view() -> None:
    x = numbers(64)[::2]
    assert launch(LOAD, x).kinds == ["global load of what lies between a view's elements"]
    assert launch("st.global.b32 [%rd4], %r1;", x).kinds == ["global store to what lies between a view's elements"]
    assert not launch(
        "shl.b32 %r3, %r1, 3; cvt.u64.u32 %rd6, %r3; add.s64 %rd6, %rd6, %rd1; ld.global.b32 %r4, [%rd6];", x
    ).kinds


def test_memory_that_nobody_has_written() -> None:
    assert launch(LOAD, numbers(), written=False).kinds == ["load of uninitialised global memory"]
    assert not launch("st.global.b32 [%rd4], %r1;" + LOAD, numbers(), written=False).kinds


# Each thread stores its number, and reads that of the thread 32 further on, in the other warp.
OTHER_WARP = """
	shl.b32 %r3, %r1, 2;
	xor.b32 %r4, %r3, 128;
	st.shared.b32 [%r3], %r1;
	{barrier}
	ld.shared.b32 %r5, [%r4];
	{after}
	st.shared.b32 [%r3], %r5;
	st.global.b32 [%rd4], %r5;
"""


@pytest.mark.parametrize(("barrier", "after", "sound"), [(1, 1, True), (1, 0, False), (0, 1, False), (0, 0, False)])
def test_races_in_shared_memory(barrier: int, after: int, sound: bool) -> None:
    body = OTHER_WARP.format(barrier="bar.sync 0;" * barrier, after="bar.sync 0;" * after)
    x = torch.zeros(64, dtype=torch.int32)
    kinds = launch(body, x, warps=2).kinds
    if sound:
        assert not kinds
        assert torch.equal(x, numbers(64) ^ 32)
    else:
        assert any("shared-memory race" in kind for kind in kinds)


def test_one_warp_needs_no_barrier() -> None:
    body = OTHER_WARP.format(barrier="", after="").replace("128", "4")
    assert not launch(body, torch.zeros(32, dtype=torch.int32)).kinds


def test_warps_that_write_the_same_word() -> None:
    same, different = "st.shared.b32 [global_smem], 7;", "shr.u32 %r3, %r1, 5; st.shared.b32 [global_smem], %r3;"
    assert not launch(same, numbers(64), warps=2).kinds
    # One after the other, since a single store of both would be another fault.
    one_by_one = "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [global_smem], 1; @!%p1 st.shared.b32 [global_smem], 2;"
    assert "shared-memory race (write)" in launch(one_by_one, numbers(64), warps=2).kinds
    assert launch(different, numbers(64), warps=2).kinds


@pytest.mark.parametrize(
    ("value", "kinds"), [("7", []), ("%r2", ["global bytes written by two programs, different values"])]
)
def test_two_programs_write_one_place(value: str, kinds: list[str]) -> None:
    x = torch.full((32,), 9, dtype=torch.int32)
    for at_once in (1, 2):
        found = launch(f"mov.b32 %r3, {value}; st.global.b32 [%rd4], %r3;", x, programs=2, at_once=at_once).kinds
        assert bool(found) == bool(kinds)
        if at_once == 1:
            assert found == kinds


def test_threads_of_a_program_that_share_a_place_without_a_barrier() -> None:
    one_by_one = "setp.lt.u32 %p1, %r1, 32; @%p1 st.global.b32 [%rd1], 1; {barrier} @!%p1 st.global.b32 [%rd1], 2;"
    kind = "global bytes written by two threads of a program without barrier, different values"
    assert launch(one_by_one.format(barrier=""), numbers(), warps=2).kinds == [kind]
    assert not launch(one_by_one.format(barrier="bar.sync 0;"), numbers(), warps=2).kinds
    handed_on = "st.global.b32 [%rd4], %r1; {barrier} xor.b32 %r3, %r1, 32; mul.wide.u32 %rd6, %r3, 4;"
    handed_on += "add.s64 %rd6, %rd6, %rd1; ld.global.b32 %r4, [%rd6];"
    kind = "global read after write by another thread without barrier"
    assert kind in launch(handed_on.format(barrier=""), numbers(64), warps=2).kinds
    assert not launch(handed_on.format(barrier="bar.sync 0;"), numbers(64), warps=2).kinds


WAIT_FOR_ALL = """
	ld.global.b32 %r3, [%rd1];
	{barrier}
	setp.eq.u32 %p1, %r1, 0;
	@%p1 atom.global.gpu.{order}.add.u32 %r4, [%rd2], 1;
	@%p1 st.shared.b32 [global_smem], %r4;
	bar.sync 0;
	ld.shared.b32 %r4, [global_smem];
	setp.eq.u32 %p2, %r4, 2;
	and.pred %p3, %p1, %p2;
	@%p3 st.global.b32 [%rd1], 100;
"""


@pytest.mark.parametrize("schedule", [{}, {"at_once": 1}, {"order": [2, 0, 1], "at_once": 1}])
def test_the_last_program_that_counts_may_write_what_all_read(schedule) -> None:
    x, count = numbers(32), torch.zeros(1, dtype=torch.int32)
    sound = WAIT_FOR_ALL.format(barrier="bar.sync 0;", order="acq_rel")
    assert not launch(sound, x, count, programs=3, warps=2, **schedule).kinds
    assert (x[0], count[0]) == (100, 3)
    kind = "read by one program, written by another"
    for barrier, order in (("", "acq_rel"), ("bar.sync 0;", "relaxed")):  # what makes the reads come first
        count.zero_()
        body = WAIT_FOR_ALL.format(barrier=barrier, order=order)
        assert kind in launch(body, x, count, programs=3, warps=2, **schedule).kinds


def test_reads_and_writes_beside_atomics() -> None:
    add = "atom.global.gpu.relaxed.add.u32 %r3, [%rd1], 1;"
    x = torch.zeros(1, dtype=torch.int32)
    assert not launch(add, x, programs=4).kinds
    assert x[0] == 4 * 32
    assert "read and atomic in one launch" in launch(add + "ld.global.b32 %r4, [%rd1];", x, programs=2).kinds
    assert "write and atomic in one launch" in launch(add + "st.global.b32 [%rd1], 3;", x, programs=2).kinds


def test_barriers_that_not_all_reach() -> None:
    in_warp = "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $there;\nbra $end;\n$there:\nbar.sync 0;\n$end:\n"
    assert "barrier reached by part of a warp" in launch(in_warp, numbers()).kinds
    of_warps = in_warp.replace("5", "32")
    assert "barrier after some threads have returned" in launch(of_warps, numbers(), warps=2).kinds


def test_warps_that_meet_at_different_barriers() -> None:
    body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $there;\nbar.sync 0;\nbra $end;\n$there:\nbar.sync 0;\n$end:\n"
    assert launch(body, numbers(), warps=2).kinds == ["warps meet at different barriers"]


def test_exchanges_with_lanes_that_are_not_there() -> None:
    body = "setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r3, %r1, 4, 31, -1;"
    assert set(launch(body, numbers()).kinds) == {
        "shuffle from an inactive lane",
        "synchronising instruction without all its lanes",
    }


COPY = """
	shl.b32 %r3, %r1, 2;
	cp.async.ca.shared.global [%r3], [%rd4], 4;
	cp.async.commit_group;
	{wait}
	{barrier}
	xor.b32 %r4, %r3, 128;
	ld.shared.b32 %r5, [%r4];
	st.global.b32 [%rd5], %r5;
"""


def test_copies_that_are_not_waited_for() -> None:
    def kinds(wait: str, barrier: str) -> list[str]:
        return launch(COPY.format(wait=wait, barrier=barrier), numbers(64), numbers(64), warps=2).kinds

    assert not kinds("cp.async.wait_group 0;", "bar.sync 0;")
    assert "shared memory used while a copy into it is in flight" in kinds("cp.async.wait_group 1;", "bar.sync 0;")
    assert "shared-memory race (read)" in kinds("cp.async.wait_group 0;", "")


def test_banks_and_sectors_are_counted() -> None:
    spread = launch("shl.b32 %r3, %r1, 7; st.shared.b32 [%r3], %r1;", numbers(), shared=4096).launched
    together = launch("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1;", numbers(), shared=4096).launched
    ((wide,), (narrow,)) = spread.banks.values(), together.banks.values()
    assert (wide.passes, wide.fewest) == (32, 1)
    assert (narrow.passes, narrow.fewest) == (1, 1)
    strided = "mul.wide.u32 %rd6, %r1, 64; add.s64 %rd6, %rd6, %rd1; ld.global.b32 %r3, [%rd6];"
    (traffic,) = launch(strided, numbers(512)).launched.traffic
    assert (traffic.sectors, traffic.fewest, traffic.requests, traffic.lanes) == (32, 4, 1, 32)
