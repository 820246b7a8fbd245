"""The plots of ``benchmarks.render``: first plain data from the results files, then matplotlib SVGs of them.

A plot carries a hash of its data in a comment, by which one that is older than its results is found: SVGs of different
versions of matplotlib differ in bytes.
"""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.accuracy import table as accuracy_table
from benchmarks.render.accuracy import in_all_bits
from benchmarks.render.tables import Content, Row

# Wong's colours (Nature Methods 2011), which colour-blind readers can tell apart; ours is the vermilion.
COLOURS = {
    "forward": "#888888",
    "FPS": "#d55e00",
    "FPS, whole batch": "#e69f00",
    "FPS, choice alone": "#e69f00",
    "GPS": "#0072b2",
    "full": "#000000",
    "LoRA": "#009e73",
    "attach": "#cc79a7",
}
OTHERS = ("#56b4e9", "#f0e442", "#888888", "#0072b2", "#009e73", "#e69f00", "#000000")
MARKERS = "osD^vP*X<>"
COLUMNS = 2  # panels side by side
STYLE: dict[str, Any] = {
    "svg.hashsalt": "fps_kernels",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
UNITS = {"memory": ("peak memory, MiB", 2**20), "time": ("ms", 1)}
SWEEPS = {
    "parameters": "parameters, millions",
    "batch": "images a step",
    "tokens": "tokens an image",
    "k": "entries a neuron",
    "density": "share of all entries, %",
}


@dataclass(frozen=True)
class Series:
    """Points of one method; ``errors`` are half-widths of bars, ``line`` a fitted power law through ``(x, y)`` pairs."""

    label: str
    x: list[float]
    y: list[float]
    errors: list[float] = field(default_factory=list)
    hollow: list[bool] = field(default_factory=list)
    line: list[tuple[float, float]] = field(default_factory=list)
    colour: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``names`` label the positions 0, 1, … of a categorical axis: ``axis`` says which."""

    title: str
    x: str
    y: str
    series: list[Series]
    log: str = ""
    names: list[str] = field(default_factory=list)
    axis: str = ""


@dataclass(frozen=True)
class Plot:
    """One file."""

    name: str
    description: str
    panels: list[Panel]
    width: float = 9.0
    height: float = 3.4

    def fingerprint(self) -> str:
        """Hash of the data, to six digits."""
        rounded = json.dumps(_rounded(asdict(self)), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(rounded.encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ data


def memory(content: Content) -> Plot:
    """Peak memory of choosing by model."""
    rows = content["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = {
        "forward": "forward",
        "FPS": "FPS, whole batch",
        "FPS, micro-batches of 1": "FPS",
        "GPS, cross-entropy": "GPS",
        "GPS, two views": "GPS, two views",
        "GPS, cross-entropy, micro-batches of 1": "GPS, micro-batches of 1",
    }
    shown = {"FPS": "FPS, micro-batches of 1", "forward": "forward pass alone", "GPS": "GPS, cross-entropy"}
    others = iter(OTHERS)
    series = []
    for method, known in labels.items():
        values = {row["model"]: row["simulated"] / 2**30 for row in rows if row["method"] == method}
        if values:
            x = [float(i) for i, model in enumerate(models) if model in values]
            y = [values[model] for model in models if model in values]
            series.append(Series(shown.get(known, known), x, y, colour=COLOURS.get(known) or next(others)))
    title = f"Peak memory of choosing, batch {rows[0]['batch']}, float32"
    panel = Panel(title, "", "GiB", series, log="y", names=models, axis="x")
    return Plot("memory_of_choosing", "Peak memory of choosing by model and method", [panel], height=3.8)


def training(content: Content) -> Plot | None:
    """Peak memory against time of a training step."""
    panels = []
    run = [row for row in content["rows"] if not row.get("simulated")]
    for model in dict.fromkeys(row["model"] for row in run):
        rows = [row for row in run if row["model"] == model]
        known = {"full": "full", "LoRA r=8": "LoRA", "attach, k=1": "FPS", "attach, k=4": "attach"}
        others, colours = iter(OTHERS), {}
        for name in dict.fromkeys(_whole(row["method"]) for row in rows):
            colours[name] = COLOURS.get(known.get(name, "")) or next(others)
        series = [
            Series(
                row["method"].replace(" (no weight gradient)", ""),
                [row["peak_bytes"] / 2**30],
                [row["time_over_full"]],
                hollow=[row["method"] != _whole(row["method"])],  # activations kept in fewer bits
                colour=colours[_whole(row["method"])],
            )
            for row in rows
        ]
        panels.append(Panel(f"{model}, batch {rows[0]['batch']}", "peak memory, GiB", "time of a step over full", series))
    description = "Peak memory and time of a training step by method"
    return Plot("training_step", description, panels, height=3.8) if panels else None


def _whole(method: str) -> str:
    """The method that keeps activations as they are, which has the colour of the same one in 8 bits."""
    return method.removesuffix(", 8 bits")


def scaling(content: Content) -> Iterator[Plot]:
    """Memory and time of every sweep with the fitted power laws."""
    for sweep, label in SWEEPS.items():
        panels = []
        scale = {"parameters": 1e-6, "density": 100.0}.get(sweep, 1.0)
        for quantity, (unit, size) in UNITS.items():
            rows = [row for row in content["rows"] if (row["sweep"], row["quantity"]) == (sweep, quantity)]
            fits = {
                f["method"]: f for f in content["fits"] if (f["sweep"], f["quantity"], f["of"]) == (sweep, quantity, "value")
            }
            series = []
            for method in dict.fromkeys(row["method"] for row in rows):
                mine = [row for row in rows if row["method"] == method]
                series.append(_fitted(method, mine, fits.get(method), scale, size))
            if series:
                kind = "simulated" if rows[0]["simulated"] else "run"
                panels.append(Panel(f"{quantity}, {kind}", label, unit, series, log="xy"))
        if panels:
            shown = " and ".join(panel.title.split(",")[0] for panel in panels).capitalize()
            yield Plot(f"scaling_{sweep}", f"{shown} against {sweep}, with fitted exponents", panels, height=4.0)


def _fitted(method: str, rows: list[Row], fit: Row | None, scale: float, size: int) -> Series:
    x = [row["x"] for row in rows]
    line = [(v * scale, fit["factor"] * v ** fit["exponent"] / size) for v in sorted(x)] if fit else []
    label = f"{method}: exponent {fit['exponent']:.2f}" if fit else method
    return Series(
        label,
        [v * scale for v in x],
        [row["value"] / size for row in rows],
        hollow=[row["on_paper"] for row in rows],
        line=line,
        colour=COLOURS[method],
    )


def accuracy(lines: list[Row]) -> Plot | None:
    """Test accuracy by method, one panel for each data set and budget."""
    tested = in_all_bits(lines)
    panels = []
    cells: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ks = sorted({line["k"] for line in tested if line["k"] is not None})
    for line in tested:
        for k in ks if line["k"] is None else [line["k"]]:
            cells[line["dataset"], k][line["method"]].append(line["accuracy"])
    names: list[str] = []
    for (dataset, k), found in sorted(cells.items()):
        estimates = {method: accuracy_table.Estimate.of(values) for method, values in found.items()}
        names = sorted(estimates, key=lambda method: estimates[method].mean)
        errors = [100 * estimates[method].error if estimates[method].count > 1 else 0.0 for method in names]
        means = [100 * estimates[method].mean for method in names]
        series = [Series("", means, [float(i) for i in range(len(names))], errors, colour=COLOURS["FPS"])]
        title = f"{dataset}, k={k}"
        panels.append(Panel(title, "% of test images, ± standard error", "", series, names=names, axis="y"))
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    return Plot("accuracy", "Test accuracy by method", panels, height=rows * (1.0 + 0.22 * len(names)))


# ------------------------------------------------------------------------------------------------ drawing


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _apart(values: Iterable[float]) -> list[float]:
    """Ticks where something was measured, except those whose labels would touch the next one's on a logarithmic axis."""
    ticks = sorted(set(values))
    nearest = (ticks[-1] / ticks[0]) ** 0.07
    return [low for low, high in pairwise(ticks) if high > nearest * low] + ticks[-1:]


def _draw(axes: Axes, panel: Panel) -> None:
    for i, s in enumerate(panel.series):
        if s.errors:
            axes.errorbar(s.x, s.y, xerr=s.errors, fmt="o", color=s.colour, capsize=2, markersize=5)
            continue
        hollow = s.hollow or [False] * len(s.x)
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": s.colour, "markersize": 5}
        solid = [(x, y) for x, y, h in zip(s.x, s.y, hollow, strict=True) if not h]
        joined = "-" if panel.names else "none"
        axes.plot(*zip(*solid, strict=True), label=s.label, linestyle=joined, linewidth=1.2, **style)
        if any(hollow):
            paper = [(x, y) for x, y, h in zip(s.x, s.y, hollow, strict=True) if h]
            axes.plot(*zip(*paper, strict=True), linestyle="none", markerfacecolor="white", **style)
        if s.line:
            axes.plot(*zip(*s.line, strict=True), color=s.colour, linewidth=1, linestyle="--")
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    for name in panel.log:
        axis = axes.xaxis if name == "x" else axes.yaxis
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
        low, high = axis.get_view_interval()
        if high < 100 * low:  # powers of ten alone would leave the axis with a label or two
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if panel.log == "xy":
        axes.xaxis.set_major_locator(FixedLocator(_apart(x for s in panel.series for x in s.x)))
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.axis:
        (axes.set_xticks if panel.axis == "x" else axes.set_yticks)(range(len(panel.names)), panel.names)
    if not panel.log:
        axes.margins(0.12)
    if any(s.label for s in panel.series):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2 if len(panel.series) < 8 else 3)


def draw(plot: Plot, kind: str = "svg") -> bytes:
    """A plot as SVG, always the same for the same data and version of matplotlib, on white so that any page can hold it.

    Args:
        plot: what to draw.
        kind: another of matplotlib's formats, to look at.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(plot.width, plot.height), layout="constrained")
        columns = min(COLUMNS, len(plot.panels))
        grid = canvas.subplots(-(-len(plot.panels) // columns), columns, squeeze=False).flat
        for axes, panel in zip_longest(grid, plot.panels):
            axes.axis("off") if panel is None else _draw(axes, panel)
        file = io.BytesIO()
        canvas.savefig(file, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    if kind != "svg":
        return file.getvalue()
    lines = [line.rstrip() for line in file.getvalue().decode().splitlines()]
    return "\n".join([*lines, f"<!-- data: {plot.fingerprint()} -->", ""]).encode()
