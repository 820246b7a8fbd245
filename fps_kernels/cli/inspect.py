"""``fps-kernels inspect``, ``compare`` and ``apply``: what is in selection and delta files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fps_kernels.cli.config import Config
from fps_kernels.cli.options import Json, Precision
from fps_kernels.cli.output import print_json, print_table
from fps_kernels.storage.atomic import check_writable, replaced_at_once

if TYPE_CHECKING:
    from fps_kernels.deltas.delta import Delta
    from fps_kernels.selection import Selection


def _selection(path: Path) -> "tuple[Selection, Delta | None]":
    from fps_kernels.deltas.delta import Delta
    from fps_kernels.deltas.file_format import FORMATS
    from fps_kernels.selection import Selection
    from fps_kernels.storage.checked_file import format_of

    if format_of(path) in FORMATS:
        delta = Delta.load(path)
        return delta.selection, delta
    return Selection.load(path), None


def inspect(
    path: Annotated[Path, typer.Argument(help="A selection or a delta file.", metavar="FILE")],
    html: Annotated[Path | None, typer.Option(help="Write a report with charts, one page.", metavar="REPORT.html")] = None,
    against: Annotated[
        Path | None, typer.Option(help="In the report: overlap with another selection or delta.", metavar="FILE")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="In the report: memory, time and accuracy of a run of tune.", metavar="DIR")
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """What a selection or a delta file holds, weight by weight.

    \b
    Example: fps-kernels inspect task.safetensors --html report.html \\
                 --against gps.safetensors --run task.run
    """
    if html is None and (against is not None or run is not None):
        raise ValueError("--against and --run go with --html")
    if html is not None:
        check_writable(html)
    selection, delta = _selection(path)
    rows = selection.summary()
    about = about_file(path, selection, delta)
    from fps_kernels.deltas.buffers import first_of

    listed = {**about, "weights": rows}
    about |= {k: f"{len(v)} ({first_of(v)})" for k, v in about.items() if isinstance(v, list)}
    if html is not None:
        _write_report(html, about, selection, against, run)
    if json:
        print_json(listed)
        return
    if html is not None:
        typer.echo(f"written: {html} ({html.stat().st_size / 1e6:.1f} MB)")
        return
    body = [
        [
            row["name"],
            "×".join(map(str, row["shape"])),
            f"{row['chosen']:,}",
            f"{row['density']:.3%}",
            f"{row['distinct_columns']} of {selection[row['name']].layout.shape[1]}",
        ]
        for row in rows
    ]
    print_table(str(path), ["weight", "shape", "chosen", "density", "columns"], body)
    for key, value in about.items():
        text = f"{value:.4%}" if key == "density" else str(value)
        typer.echo(f"{key}: {text if len(text) <= 100 else text[:99] + '…'}")
    if delta is not None and delta.entries:
        own = path.stat().st_size - sum(b.nbytes for b in delta.buffers.values())
        typer.echo(f"bytes an entry: {own / delta.entries:.2f}{' without the buffers' if delta.buffers else ''}")


def about_file(path: Path, selection: "Selection", delta: "Delta | None") -> dict[str, Any]:
    """What is told of a selection or a delta beside its weights."""
    return {
        "file": str(path),
        "kind": "selection" if delta is None else "delta",
        "bytes": path.stat().st_size,
        "entries": selection.nnz if delta is None else delta.entries,
        "density": selection.density,
        "trained_whole": len(selection.dense),
        **selection.description,
        **({} if delta is None else {"base": delta.base, **_buffers(delta), **delta.versions}),
    }


def _buffers(delta: "Delta") -> dict[str, Any]:
    """What is told of the buffers that training changed, where there are any."""
    found: dict[str, Any] = {}
    if delta.buffers:
        found["buffers"] = list(delta.buffers)
    if delta.buffers_left_out:
        found["buffers_left_out"] = list(delta.buffers_left_out)
    return found


def _write_report(html: Path, about: dict[str, Any], selection: "Selection", against: Path | None, run: Path | None) -> None:
    from fps_kernels.report import Run

    other = None if against is None else (str(against), _selection(against)[0])
    found = None if run is None else Run.read(run)
    write_page(html, about, selection, against=other, run=found, evaluation=None if found is None else found.evaluation)


def write_page(html: Path, about: dict[str, Any], selection: "Selection", **more: Any) -> None:
    """Write a report; see :func:`fps_kernels.report.report`."""
    from fps_kernels.report import report

    page = report(about, selection, **more)
    with replaced_at_once(html) as temporary:
        temporary.write_text(page, encoding="utf-8")


def compare(
    first: Annotated[Path, typer.Argument(help="A selection or a delta file.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same model.")],
    json: Json = False,
    config: Config = None,
) -> None:
    """How much two choices have in common, weight by weight: common entries over those of the smaller choice.

    \b
    Example: fps-kernels compare fps.safetensors gps.safetensors
    """
    a, b = _selection(first)[0], _selection(second)[0]
    common = a & b
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys((*a, *b)):
        counts = [s[name].nnz if name in s else 0 for s in (a, b)]
        both = common[name].nnz if name in common and name in a and name in b else 0
        rows.append({"name": name, "first": counts[0], "second": counts[1], "common": both})
    total = a.overlap(b)
    if json:
        print_json({"overlap": total, "weights": rows})
        return
    body = []
    for row in rows:
        smaller = min(row["first"], row["second"])
        share = f"{row['common'] / smaller:.1%}" if smaller else "–"
        body.append([row["name"], *(f"{row[key]:,}" for key in ("first", "second", "common")), share])
    print_table(f"{first} and {second}", ["weight", "first", "second", "common", "overlap"], body)
    typer.echo(f"overlap: {total:.2%}")


def apply(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    base: Annotated[Path, typer.Argument(help="The base model's weights: a .safetensors or .pth file.")],
    output: Annotated[Path, typer.Argument(help="Where the tuned weights go, a safetensors file.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the floating-point weights; the base's own if not given.")
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Write the weights of a base model with a delta applied.

    The base is checked by the names, shapes and dtypes that the delta needs, not by its fingerprint: a checkpoint may lack
    parameters that the model had when it was tuned (its new head), or have them in another shape (its old head).

    \b
    Example: fps-kernels apply task.safetensors base.safetensors tuned.safetensors
    """
    check_writable(output)
    from fps_kernels.runs.applying import apply_delta

    found = apply_delta(delta, base, output, None if dtype is None else dtype.dtype)
    if json:
        print_json({"file": str(output), "entries": found.entries, "weights": found.weights, "new": list(found.new)})
        return
    buffers = f", {found.buffers} buffers" if found.buffers else ""
    parts = f"{found.weights} weights and {found.dense} parameters{buffers}"
    typer.echo(f"{output}: {found.entries:,} entries of {parts}")
