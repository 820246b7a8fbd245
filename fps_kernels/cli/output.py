"""Tables for people, JSON for scripts."""

import json
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fps_kernels.selection import Selection


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


def print_selection(title: str, selection: "Selection") -> None:
    """One row per weight; for deep models one row per kind of weight."""
    from fps_kernels.selection.summary import is_deep, summarised

    deep = is_deep(selection)
    body = []
    for row in summarised(selection):
        layers = [str(row.weights)] if deep else []
        body.append([row.name, *layers, row.shape, f"{row.chosen:,}", f"{row.density:.2%}", row.columns_text])
    print_table(title, ["weight", *(["layers"] if deep else []), "shape", "chosen", "density", "columns"], body)
