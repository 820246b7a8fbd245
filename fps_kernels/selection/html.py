"""Tables for notebooks: plain HTML, which follows the notebook's own style."""

import html
from collections.abc import Iterable, Sequence


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A table with a title above and notes below; every text is escaped. Columns but the first are aligned to the right."""
    made = [f"<th style='text-align:{_side(i)}'>{html.escape(name)}</th>" for i, name in enumerate(head)]
    lines = [f"<p><strong>{html.escape(title)}</strong></p>", f"<table><thead><tr>{''.join(made)}</tr></thead><tbody>"]
    for row in rows:
        cells = (f"<td style='text-align:{_side(i)}'>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    if told := " · ".join(html.escape(note) for note in notes):
        lines.append(f"<p><small>{told}</small></p>")
    return "\n".join(lines)


def _side(place: int) -> str:
    return "right" if place else "left"
