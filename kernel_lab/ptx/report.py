"""One line for each case, and a table of all."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

from kernel_lab.ptx.cases import SHORT
from kernel_lab.ptx.checking import Checked
from kernel_lab.ptx.machine import Launched

SHOWN_LINES = 6  # of source, of each kernel
SECTOR = 32


class Figures(TypedDict):
    """A case in numbers, as it is written into JSON.

    Attributes:
        requested_bytes: of the sectors that the requests of all warps touch.
        unique_bytes: of the distinct sectors of each launch, read or written.
        least_bytes: what the op as designed must move.
        instructions_per_element: counted by thread.
        bank_passes: that accesses to shared memory take, beside the fewest possible.
    """

    target: str
    op: str
    dtype: str
    name: str
    large: bool
    kernels: list[str]
    launches: int
    programs: int
    error: float
    requested_bytes: int
    read_bytes: int
    written_bytes: int
    unique_bytes: int
    least_bytes: int
    elements: int
    instructions_per_element: float
    bank_passes: int
    fewest_bank_passes: int
    problems: list[str]
    notes: list[str]


def figures(checked: Checked) -> Figures:
    """Of one case."""
    launched = checked.launched
    instructions = sum(int(launch.issued.sum()) for launch in launched)
    banks = [banks for launch in launched for banks in launch.banks.values()]
    return {
        "target": checked.target,
        "op": checked.case.op,
        "dtype": SHORT[checked.case.dtype],
        "name": checked.case.name,
        "large": checked.case.large,
        "kernels": list(dict.fromkeys(launch.kernel.lstrip("_") for launch in launched)),
        "launches": len(launched),
        "programs": sum(launch.programs for launch in launched),
        "error": checked.error,
        "requested_bytes": SECTOR * sum(launch.sectors("load", "store", "atomic") for launch in launched),
        "read_bytes": sum(launch.read_bytes for launch in launched),
        "written_bytes": sum(launch.written_bytes for launch in launched),
        "unique_bytes": sum(launch.read_bytes + launch.written_bytes for launch in launched),
        "least_bytes": checked.least_bytes,
        "elements": checked.elements,
        "instructions_per_element": instructions / max(1, checked.elements),
        "bank_passes": sum(bank.passes for bank in banks),
        "fewest_bank_passes": sum(bank.fewest for bank in banks),
        "problems": checked.problems,
        "notes": checked.notes,
    }


def line(checked: Checked, seconds: float) -> str:
    """The line of a case, and a further one for each problem."""
    told = figures(checked)
    requested, unique, least = told["requested_bytes"], told["unique_bytes"], told["least_bytes"]
    exact = "exact" if checked.error == 0 else f"{checked.error:.1e}"
    head = " | ".join(
        (
            f"{checked.target} {checked.case}",
            "+".join(told["kernels"]),
            f"{told['programs']} programs",
            exact,
            f"{len(checked.problems)} problems, {len(checked.notes)} notes",
            f"{requested // SECTOR} sectors = {requested / max(1, unique):.2f}x unique",
            f"unique {unique} B = {unique / max(1, least):.2f}x of {least} B",
            f"{told['instructions_per_element']:.0f} instructions/element",
            f"{seconds:.1f} s",
        )
    )
    return "\n".join((head, *(f"    {problem}" for problem in checked.problems)))


def traffic(launched: Iterable[Launched]) -> str:
    """Where the sectors and instructions of some launches go, and where banks conflict: by kernel and line of source."""
    lines = []
    for launch in launched:
        total = launch.sectors("load", "store", "atomic")
        unique = launch.read_bytes + launch.written_bytes
        times = total * SECTOR / max(1, unique)
        lines.append(f"      {launch.kernel}: {launch.programs} programs, {total} sectors, {times:.2f}x unique")
        by_line: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for moved in launch.traffic:
            counted = moved.sectors, moved.fewest, moved.requests, moved.lanes
            by_line[moved.where, moved.kind] = [
                a + b for a, b in zip(by_line[moved.where, moved.kind], counted, strict=True)
            ]
        for (where, kind), (sectors, fewest, requests, lanes) in sorted(by_line.items(), key=lambda item: -item[1][0])[
            :SHOWN_LINES
        ]:
            lines.append(
                f"        {where} {kind}: {sectors} sectors, {sectors / max(1, fewest):.2f}x the fewest, "
                f"{requests} requests by {lanes} threads"
            )
        issued = sum(launch.by_line.values())
        for where, instructions in sorted(launch.by_line.items(), key=lambda item: -item[1])[:SHOWN_LINES]:
            lines.append(f"        {where} instructions: {instructions / max(1, issued):.0%} of {issued}, by threads")
        for where, banks in launch.banks.items():
            if banks.passes > banks.fewest:
                lines.append(f"        {where} shared memory: {banks.passes} passes, the fewest are {banks.fewest}")
    return "\n".join(lines)


def table(results: list[Figures]) -> str:
    """Of each op, dtype and target: cases, problems, and the traffic of the large cases, or of all if none is large."""
    rows = [("op", "dtype", "target", "cases", "requested/unique", "unique/least", "instructions/element", "problems")]
    groups: defaultdict[tuple[str, str, str], list[Figures]] = defaultdict(list)
    for told in results:
        groups[told["op"], told["dtype"], told["target"]].append(told)
    for key, members in groups.items():
        shown = [told for told in members if told["large"]] or members
        requested = sum(told["requested_bytes"] for told in shown)
        unique = sum(told["unique_bytes"] for told in shown)
        least = sum(told["least_bytes"] for told in shown)
        instructions = sum(told["instructions_per_element"] * told["elements"] for told in shown)
        per_element = instructions / max(1, sum(told["elements"] for told in shown))
        problems = sum(bool(told["problems"]) for told in members)
        ratios = f"{requested / max(1, unique):.2f}", f"{unique / max(1, least):.2f}", f"{per_element:.0f}"
        rows.append((*key, str(len(members)), *ratios, str(problems)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
