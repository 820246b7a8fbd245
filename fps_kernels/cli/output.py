"""Tables for people, JSON for scripts."""

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fps_kernels.report.layers import kind_of
from fps_kernels.selection import Selection

ROWS_SHOWN_ONE_BY_ONE = 24


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table, as wide as it needs to be where the output is no terminal. Cells are shown as they are, without markup."""
    console = Console()
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(head):
        # Where a terminal is too narrow the names break, never the numbers.
        table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_selection(title: str, selection: Selection) -> None:
    """One row per weight; for deep models one row per kind of weight."""
    deep = len(selection) > ROWS_SHOWN_ONE_BY_ONE
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in selection.summary():
        kinds.setdefault(kind_of(row["name"]) if deep else row["name"].removesuffix(".weight"), []).append(row)
    body = []
    for kind, members in kinds.items():
        shapes = {"×".join(map(str, m["shape"])) for m in members}
        shares = [m["distinct_columns"] / selection[m["name"]].layout.shape[1] for m in members]
        low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
        chosen, entries = sum(m["chosen"] for m in members), sum(_entries(selection, m["name"]) for m in members)
        shape = shapes.pop() if len(shapes) == 1 else "various"
        body.append([kind, *([str(len(members))] if deep else []), shape, f"{chosen:,}", f"{chosen / entries:.2%}"])
        body[-1].append(low if low == high else f"{low}–{high}")
    print_table(title, ["weight", *(["layers"] if deep else []), "shape", "chosen", "density", "columns"], body)


def _entries(selection: Selection, name: str) -> int:
    rows, columns = selection[name].layout.shape
    return rows * columns
