"""A selection, and a run that tuned it, as one HTML page with charts that needs no network.

The page holds everything, plotly's code included, and forbids the browser to load anything else. It follows the reader's
light or dark scheme and the width of the window.
"""

import base64
import gzip
import html
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from fps_kernels.memory import format_bytes
from fps_kernels.report.layers import Layer, layers_of
from fps_kernels.runs.hints import install_hint
from fps_kernels.selection import Selection

if TYPE_CHECKING:
    from fps_kernels.deltas.delta import Delta
    from fps_kernels.runs.evaluation import Evaluation

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """What a run of ``fps-kernels tune`` left in its folder.

    Attributes:
        name: of the folder.
        settings: by the names of the options.
        records: of ``metrics.jsonl``.
        choosing: ``seconds``, ``peak_memory`` (bytes) and ``images`` of the choice, if the run made it.
        evaluation: what the tuned model did on the images it was measured on, if the run is at its end.
    """

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    choosing: dict[str, float]
    evaluation: "Evaluation | None" = None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """From the folder of a run, finished or not.

        Raises:
            ValueError: it is no folder of a run, or damaged.
        """
        from fps_kernels.runs.evaluation import Evaluation
        from fps_kernels.runs.folder import RunFolder, read_metrics

        run = RunFolder(folder)
        if not run.metrics.is_file():
            raise ValueError(f"{folder} is no folder of a run: it has no metrics.jsonl")
        found = Evaluation.load(run.evaluation) if run.evaluation.is_file() else None
        return cls(str(folder), run.settings, read_metrics(run.metrics), run.choosing, found)

    def of(self, kind: str, *keys: str) -> list[dict[str, Any]]:
        """Records of a type that have numbers under the keys."""
        found = [r for r in self.records if r.get("type") == kind]
        return [r for r in found if all(isinstance(r.get(key), int | float) for key in keys)]


def report(
    about: Mapping[str, Any],
    selection: Selection,
    *,
    against: tuple[str, Selection] | None = None,
    run: Run | None = None,
    evaluation: "Evaluation | None" = None,
) -> str:
    """The page.

    Args:
        about: what is known of the file: ``file``, ``kind``, ``bytes``, ``entries`` and what else is to be shown.
        selection: of the file.
        against: name of another selection of the same model, and it.
        run: the run that tuned it.
        evaluation: what the tuned model did on images.

    Returns:
        HTML. Every name in it is escaped.

    Raises:
        ValueError: a selection without entries, or ``against`` of another model.
        ImportError: plotly is missing.

    Example:
        >>> page = report({"file": "fps.safetensors", "kind": "selection"}, selection)
        >>> Path("report.html").write_text(page)
    """
    try:
        from plotly.offline import get_plotlyjs

        from fps_kernels.report import figures, outcomes
    except ImportError as error:
        raise ImportError(install_hint("the report", error), name=error.name) from error
    if not selection.nnz:
        raise ValueError(f"{about.get('file', 'the selection')} has no chosen entries to draw")
    layers = layers_of(selection, None if against is None else against[1])
    charts = figures.of_selection(layers, None if against is None else against[0])
    charts += figures.of_run(run) if run is not None else []
    charts += outcomes.of_evaluation(evaluation) if evaluation is not None else []
    sections = []
    for i, chart in enumerate(charts):
        alone = i == len(charts) - 1 and sum(not c.wide for c in charts) % 2 == 1
        wide = " wide" if chart.wide or alone else ""
        sections.append(
            f'<section class="card{wide}"><h2>{_e(chart.title)}</h2><p>{_e(chart.text)}</p>'
            f'<div class="chart" id="{chart.key}" role="img" aria-label="{_e(chart.title)}"></div></section>'
        )
    drawn = {c.key: json.loads(c.figure.to_json()) | {"narrow": c.narrow} for c in charts}
    drawings = {"charts": drawn, "themes": figures.THEMES}
    page = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=_e(Path(str(about.get("file", "selection"))).name),
        subtitle=_e(_subtitle(about, run)),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        tiles="".join(_tile(label, value) for label, value in _tiles(about, selection, layers, against, run, evaluation)),
        sections="\n".join([*sections, outcomes.worst_images(evaluation) if evaluation is not None else ""]),
        table=_table(layers, against is not None),
        details=_details("About the file", about) + (_details("Settings of the run", run.settings) if run else ""),
        # The browser unpacks it: a quarter of its size, even as letters.
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
        drawings=_in_script(drawings),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def figure(
    of: "Selection | Delta | Run | Evaluation",
    chart: str = "map",
    *,
    against: "Selection | Delta | None" = None,
    theme: str = "light",
) -> Any:
    """One chart of the report by itself, as a figure of plotly's, which notebooks show.

    Args:
        of: a selection or a delta; the :class:`Run` of a folder; or an evaluation.
        chart: of a selection ``map``, ``concentration``, ``distinct``, ``density`` or ``overlap``; of a run ``loss``,
            ``accuracy``, ``time`` or ``memory``; of an evaluation ``classes`` or ``confusion``.
        against: for ``overlap``, another selection of the same model.
        theme: ``light`` or ``dark``.

    Raises:
        ValueError: no such chart or theme, a selection without entries, or ``against`` of another model.
        ImportError: plotly is missing.

    Example:
        >>> figure(selection, "concentration").show()
        >>> figure(Run.read(Path("task.run")), "accuracy")
    """
    figures, outcomes = _drawing()
    if isinstance(of, Run):
        charts = figures.of_run(of)
    elif hasattr(of, "confusion"):
        charts = outcomes.of_evaluation(of)
    else:
        selection, other = (x if isinstance(x, Selection | None) else _chosen_by(x) for x in (of, against))
        assert selection is not None
        if not selection.nnz:
            raise ValueError("the selection has no chosen entries to draw")
        charts = figures.of_selection(layers_of(selection, other), None if other is None else "the other")
    found = next((c for c in charts if c.key == chart), None)
    if found is None:
        more = " (overlap needs against=)" if chart == "overlap" else ""
        raise ValueError(f"chart must be one of {', '.join(c.key for c in charts)}, got {chart!r}{more}")
    return figures.themed(found, theme)


def _chosen_by(delta: Any) -> Selection:
    found: Selection = delta.selection
    return found


def _drawing() -> Any:
    try:
        from fps_kernels.report import figures, outcomes
    except ImportError as error:
        raise ImportError(install_hint("the report", error), name=error.name) from error
    return figures, outcomes


def _subtitle(about: Mapping[str, Any], run: Run | None) -> str:
    parts = [str(about[key]) for key in ("kind", "model", "scorer", "budget") if about.get(key)]
    return " · ".join([*parts, *([run.name] if run else [])])


def _tiles(
    about: Mapping[str, Any],
    selection: Selection,
    layers: list[Layer],
    against: tuple[str, Selection] | None,
    run: Run | None,
    evaluation: "Evaluation | None",
) -> list[tuple[str, str]]:
    entries = about.get("entries")
    tiles = [("chosen entries", f"{selection.nnz:,}"), ("density", f"{selection.density:.3%}")]
    tiles += [("weights", str(len(selection))), ("trained whole", f"{len(selection.dense)} parameters")]
    used, every = sum(layer.distinct for layer in layers), sum(layer.columns for layer in layers)
    tiles.append(("columns used", f"{used / every:.1%}"))
    if isinstance(size := about.get("bytes"), int):
        tiles.append(("file", format_bytes(size)))
        if about.get("kind") == "delta" and isinstance(entries, int) and entries:
            tiles.append(("bytes an entry", f"{size / entries:.2f}"))
    if against is not None:
        tiles.append((f"overlap with {Path(against[0]).name}", f"{selection.overlap(against[1]):.1%}"))
    if evaluation is not None:
        tiles.append((f"accuracy, {evaluation.images:,} images", f"{evaluation.accuracy:.2%}"))
        if evaluation.top5 is not None:
            tiles.append(("among the first five", f"{evaluation.top5:.2%}"))
    if run is not None:
        if evaluation is None and (evals := run.of("eval", "accuracy")):
            tiles.append(("accuracy", f"{evals[-1]['accuracy']:.2%}"))
        peaks = [r["peak_memory"] for r in run.records if isinstance(r.get("peak_memory"), int)]
        if peaks:
            tiles.append(("peak memory, tuning", format_bytes(max(peaks))))
        if times := [r["step_seconds"] for r in run.of("train", "step_seconds")]:
            tiles.append(("step, median", f"{statistics.median(times):.3g} s"))
        if {"seconds", "peak_memory"} <= run.choosing.keys():
            tiles.append(("choosing", f"{run.choosing['seconds']:.3g} s · {format_bytes(run.choosing['peak_memory'])}"))
    return tiles


def _tile(label: str, value: str) -> str:
    return f"<div><dt>{_e(label)}</dt><dd>{_e(value)}</dd></div>"


def _table(layers: list[Layer], compared: bool) -> str:
    heads = ["weight", "shape", "chosen", "density", "columns used", "in the fullest 10 % of columns"]
    rows = []
    for layer in layers:
        cells = [
            layer.name,
            layer.shape,
            f"{layer.chosen:,}",
            f"{layer.density:.3%}",
            f"{layer.distinct} of {layer.columns}",
        ]
        cells.append(f"{layer.share_of_fullest(0.1):.1%}" if layer.chosen else "–")
        if compared:
            cells.append("–" if layer.overlap is None else f"{layer.overlap:.1%}")
        rows.append("".join(f"<td>{_e(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{_e(text)}</th>" for text in [*heads, *(["overlap"] if compared else [])])
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append(f"<tr><th>{_e(key)}</th><td>{_e(text)}</td></tr>")
    return f'<details class="card wide"><summary>{_e(title)}</summary><table class="pairs">{"".join(rows)}</table></details>'


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _in_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
