"""The order of a kernel's blocks: one in which threads that part meet again as early as they can.

The machine lets the threads that are furthest behind go first. They then wait for each other where their branches end (at
the post-dominator of the branch, where ptxas has them meet) if every block comes after all that lead to it, but for the
edge back to a loop's head, and if every loop is contiguous.
"""

from collections.abc import Iterator
from dataclasses import replace

from kernel_lab.ptx.instructions import Instruction, Label, Program


def lay_out(program: Program) -> Program:
    """The same program with its blocks in that order, and the instructions numbered."""
    code = program.instructions
    starts = {0} | {place for place in program.labels.values() if place < len(code)}
    starts |= {place + 1 for place, instruction in enumerate(code[:-1]) if instruction.ends_block}
    blocks = sorted(starts)
    end = dict(zip(blocks, [*blocks[1:], len(code)], strict=True))
    following = {block: _following(program, end[block]) for block in blocks}
    laid: list[Instruction] = []
    position: dict[int, int] = {}
    labels = dict(program.labels)
    order = _order(following)
    for number, block in enumerate(order):
        position[block] = len(laid)
        laid += code[block : end[block]]
        if code[end[block] - 1].goes_on and order[number + 1 : number + 2] != [end[block]]:
            labels[f"after {block}"] = end[block]
            where = code[end[block] - 1].where
            laid.append(Instruction("bra", (Label(f"after {block}"),), None, False, where, "(goes on)"))
    return replace(
        program,
        instructions=[replace(instruction, place=place) for place, instruction in enumerate(laid)],
        labels={name: position[place] for name, place in labels.items() if place in position},
    )


def _following(program: Program, end: int) -> list[int]:
    """The blocks to which the one before ``end`` leads."""
    last = program.instructions[end - 1]
    after = []
    if last.family == "bra":
        (target,) = last.operands
        assert isinstance(target, Label)
        after.append(program.labels[target.name])
    if last.goes_on:
        after.append(end)
    return after


def _order(following: dict[int, list[int]]) -> list[int]:
    """Topological but for the edges back, every loop contiguous."""
    loops = _loops(following)
    order = _finished(following, loops)[::-1]
    for loop in sorted(loops.values(), key=len):  # inner ones first
        places = [i for i, block in enumerate(order) if block in loop]
        between = order[places[0] : places[-1] + 1]
        order[places[0] : places[-1] + 1] = [b for b in between if b in loop] + [b for b in between if b not in loop]
    return order


def _loops(following: dict[int, list[int]]) -> dict[int, set[int]]:
    """The blocks of each natural loop, by its head."""
    preceding: dict[int, list[int]] = {block: [] for block in following}
    for block, after in following.items():
        for next_ in after:
            preceding[next_].append(block)
    loops: dict[int, set[int]] = {}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(following[0]))]
    open_, seen = {0}, {0}
    while stack:
        block, rest = stack[-1]
        other = next(rest, None)
        if other is None:
            open_.remove(block)
            stack.pop()
        elif other in open_:  # an edge back
            body, reached = loops.setdefault(other, {other}), [block]
            while reached:
                member = reached.pop()
                if member not in body:
                    body.add(member)
                    reached += preceding[member]
        elif other not in seen:
            seen.add(other)
            open_.add(other)
            stack.append((other, iter(following[other])))
    return loops


def _finished(following: dict[int, list[int]], loops: dict[int, set[int]]) -> list[int]:
    """The blocks as a search in depth leaves them; ways out of loops are searched before what stays inside."""

    def shared_loops(block: int, other: int) -> int:
        return sum(block in body and other in body for body in loops.values())

    def successors(block: int) -> Iterator[int]:
        return iter(sorted(following[block], key=lambda other: shared_loops(block, other)))

    finished: list[int] = []
    seen = {0}
    stack = [(0, successors(0))]
    while stack:
        block, rest = stack[-1]
        other = next(rest, None)
        if other is None:
            finished.append(block)
            stack.pop()
        elif other not in seen:
            seen.add(other)
            stack.append((other, successors(other)))
    return finished
