"""A selection in a few rows: one per weight, or for deep models one per kind of weight."""

import re
from dataclasses import dataclass
from typing import Any

from fps_kernels.selection.html import html_table
from fps_kernels.selection.selection import Selection

ROWS_SHOWN_ONE_BY_ONE = 24


def kind_of(name: str) -> str:
    """The name of a weight without the number of its layer: ``blocks.*.attn.qkv``."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name.removesuffix(".weight"))


@dataclass(frozen=True)
class SummaryRow:
    """Weights that are told of together.

    Attributes:
        name: of the weight, or of its kind.
        weights: how many.
        shape: of the parameters, or ``various``.
        chosen: entries.
        density: share of the entries that is chosen.
        columns: share of the columns with at least one chosen entry: the least and the most among the weights.
    """

    name: str
    weights: int
    shape: str
    chosen: int
    density: float
    columns: tuple[float, float]

    @property
    def columns_text(self) -> str:
        """``12%``, or ``3%–12%``."""
        low, high = (f"{share:.0%}" for share in self.columns)
        return low if low == high else f"{low}–{high}"


def html_of(selection: Selection, title: str) -> str:
    """A notebook's table of a selection."""
    rows = [
        [
            row.name,
            str(row.weights),
            row.shape,
            f"{row.chosen:,}",
            f"{row.density:.2%}",
            row.columns_text,
        ]
        for row in summarised(selection)
    ]
    notes = [f"{len(selection.dense)} parameters trained whole"] if selection.dense else []
    notes += [f"{len(selection.skipped)} matrix weights not selected (.skipped says why)"] if selection.skipped else []
    notes += [f"{key}: {value if len(value) <= 80 else value[:79] + '…'}" for key, value in selection.description.items()]
    return html_table(title, ["weight", "layers", "shape", "chosen", "density", "columns"], rows, notes)


def is_deep(selection: Selection) -> bool:
    """Whether there are too many weights to tell of each."""
    return len(selection) > ROWS_SHOWN_ONE_BY_ONE


def summarised(selection: Selection) -> list[SummaryRow]:
    """One row per weight; for deep models one row per kind of weight."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in selection.summary():
        name = kind_of(row["name"]) if is_deep(selection) else row["name"].removesuffix(".weight")
        kinds.setdefault(name, []).append(row)
    rows = []
    for name, members in kinds.items():
        shapes = {"×".join(map(str, m["shape"])) for m in members}
        sizes = [selection[m["name"]].layout.shape for m in members]
        shares = [m["distinct_columns"] / columns for m, (_, columns) in zip(members, sizes, strict=True)]
        chosen = sum(m["chosen"] for m in members)
        shape = shapes.pop() if len(shapes) == 1 else "various"
        density = chosen / sum(O * C for O, C in sizes)
        rows.append(SummaryRow(name, len(members), shape, chosen, density, (min(shares), max(shares))))
    return rows
