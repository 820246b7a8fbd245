"""The charts of a report. Names are escaped: plotly reads a part of HTML in its texts."""

import html
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch

from fps_kernels.report.layers import Group, Layer, groups_of

if TYPE_CHECKING:
    from fps_kernels.report import Run

BINS = 96
_POINTS = 100

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def _theme(ink: str, faint: str, grid: str, card: str, colours: list[str], scale: list[str]) -> dict[str, Any]:
    axis = {
        "ticks": "outside",
        "ticklen": 5,
        "tickwidth": 0,
        "gridcolor": grid,
        "zerolinecolor": grid,
        "linecolor": grid,
        "tickcolor": grid,
        "tickfont": {"color": faint},
    }
    layout = {
        "font": {"color": ink, "family": _FONT, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": colours,
        "colorscale": {"sequential": [[i / (len(scale) - 1), colour] for i, colour in enumerate(scale)]},
        "coloraxis": {"colorbar": {"outlinewidth": 0, "tickfont": {"color": faint}}},
        "xaxis": {**axis, "automargin": True, "title": {"standoff": 6}},
        "yaxis": {**axis, "automargin": True, "title": {"standoff": 8}},
        "hoverlabel": {"bgcolor": card, "bordercolor": grid, "font": {"color": ink, "family": _FONT}},
        "legend": {"font": {"color": ink}},
    }
    return {"layout": layout, "ink": ink}


THEMES = {
    "light": _theme(
        "#1d2430",
        "#5a6473",
        "#e2e6ec",
        "#ffffff",
        ["#2468b2", "#c9641a", "#23824f", "#8f45ab", "#a67c00", "#bb3763", "#3f7482", "#75624d"],
        ["#eef2f8", "#bcd2ea", "#74a4d6", "#2f6cae", "#0a2c58"],
    ),
    "dark": _theme(
        "#e4e8ee",
        "#9aa5b4",
        "#333a45",
        "#1b1f26",
        ["#6cabf0", "#f2a35c", "#5fc993", "#c990e4", "#e3c35e", "#f08bac", "#8bbccb", "#bfae98"],
        ["#20252d", "#1d466d", "#2d7bb4", "#7cc4ea", "#f5fbff"],
    ),
}


@dataclass(frozen=True)
class Chart:
    """A figure and its place on the page.

    Attributes:
        key: its id.
        title: what it shows.
        text: how to read it.
        figure: plotly's.
        wide: it takes the whole width.
        narrow: changes of its layout on narrow screens.
    """

    key: str
    title: str
    text: str
    figure: go.Figure
    wide: bool = False
    narrow: dict[str, Any] = field(default_factory=dict)


def themed(chart: Chart, theme: str) -> go.Figure:
    """A chart's figure by itself, in the colours that the page gives it.

    Raises:
        ValueError: there is no such theme.
    """
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, got {theme!r}")
    layout = THEMES[theme]["layout"]
    figure = go.Figure(chart.figure)
    paper = layout["hoverlabel"]["bgcolor"]
    figure.update_layout(
        template={"layout": layout}, title=chart.title, paper_bgcolor=paper, plot_bgcolor=paper, margin={"t": 48}
    )
    for trace in figure.data:
        if trace.name == "even":
            trace.line.color = THEMES[theme]["ink"]
        elif trace.meta is not None:
            colour = layout["colorway"][trace.meta["colour"]]
            trace.line.color = trace.marker.color = colour
    return figure


def of_selection(layers: list[Layer], against: str | None) -> list[Chart]:
    """Where the chosen entries lie, how concentrated they are, how dense, and how many of them are common.

    At least one of the layers has entries.
    """
    groups = groups_of(layers)
    charts = [_heat_map(layers), _concentration(groups), _distinct(layers, groups), _density(layers, groups)]
    if against is not None:
        charts.append(_overlap(layers, groups, against))
    return charts


def of_run(run: "Run") -> list[Chart]:
    """What became better, and what a step cost."""
    charts = []
    curves = []
    measured = next((str(r["split"]) for r in run.records if r.get("type") == "eval" and "split" in r), "test")
    for kind, label in (("train", "training"), ("eval", measured)):
        if records := run.of(kind, "epoch", "loss"):
            curves.append((label, [r["epoch"] for r in records], [r["loss"] for r in records]))
    if curves:
        charts.append(_curves("loss", "Loss", "Cross-entropy by epoch.", curves, ".4f", None))
    if records := run.of("eval", "epoch", "accuracy"):
        points = [(measured, [r["epoch"] for r in records], [r["accuracy"] for r in records])]
        text = f"Share of the {measured} images that are classified correctly, by epoch."
        charts.append(_curves("accuracy", "Accuracy", text, points, ".2%", ".3~%"))
    if records := run.of("train", "step", "step_seconds"):
        figure = _curve_figure([("step", [r["step"] for r in records], [r["step_seconds"] for r in records])], ".3g")
        figure.update_layout(xaxis_title="step", yaxis={"title": "seconds", "rangemode": "tozero"}, showlegend=False)
        charts.append(Chart("time", "Time of a step", "Mean since the record before, with reading the images.", figure))
    if records := run.of("train", "step", "peak_memory"):  # on the CPU it is measured once, and stands in a tile
        figure = _curve_figure([("peak", [r["step"] for r in records], [r["peak_memory"] / 2**20 for r in records])], ",.0f")
        figure.update_layout(xaxis_title="step", yaxis={"title": "MiB", "rangemode": "tozero"}, showlegend=False)
        charts.append(Chart("memory", "Peak memory", "What torch's allocator had given out at most.", figure))
    return charts


# ------------------------------------------------------------------------------------------------ of the selection


def _heat_map(layers: list[Layer]) -> Chart:
    ratios = [layer.binned(BINS) for layer in layers]
    row = 15 if len(layers) <= 60 else max(6, 1200 // len(layers))
    every = -(-11 // row)  # where rows are lower than letters, not every one has a label
    labelled = list(range(0, len(layers), every))
    # A weight with one entry has a cell of BINS times its mean: such cells must not make all others pale.
    cells = torch.tensor(ratios).flatten()
    most = max(4.0, float(cells.quantile(0.998)))
    ticks = [0.0] + [v for v in (1.0, 4.0, 16.0, 64.0) if v < most * 0.7] + [most]
    beyond = "≥ " if float(cells.max()) > most else ""
    names = [escaped(layer.name) for layer in layers]
    figure = go.Figure(
        go.Heatmap(
            z=[[math.sqrt(v) for v in r] for r in ratios],
            x=[(i + 0.5) / BINS for i in range(BINS)],
            y=list(range(len(layers))),
            customdata=[[[name, round(v, 2)] for v in r] for name, r in zip(names, ratios, strict=True)],
            hovertemplate="%{customdata[0]}<br>at %{x:.0%} of the columns: %{customdata[1]}× its mean<extra></extra>",
            coloraxis="coloraxis",
            ygap=1 if row >= 10 else 0,
        )
    )
    labels = [escaped(layers[i].name.removesuffix(".weight")) for i in labelled]
    figure.update_layout(
        height=110 + row * len(layers),
        margin={"l": 8, "r": 20, "t": 8, "b": 8},
        xaxis={"title": "column, from the first to the last", "tickformat": ".0%", "range": [0, 1], "showgrid": False},
        yaxis={
            "tickvals": labelled,
            "ticktext": labels,
            "autorange": "reversed",
            "showgrid": False,
            "tickfont": {"size": min(12, max(9, row - 2))},
        },
        coloraxis={
            "cmin": 0,
            "cmax": math.sqrt(most),
            "colorbar": {
                "tickvals": [math.sqrt(v) for v in ticks],
                "ticktext": [*(f"{v:.3g}×" for v in ticks[:-1]), f"{beyond}{most:.3g}×"],
                "thickness": 12,
                "len": 240,
                "lenmode": "pixels",
                "y": 1,
                "yanchor": "top",
            },
        },
    )
    narrow = {
        "yaxis.ticktext": [escaped(layers[i].short) for i in labelled],
        "yaxis.tickfont.size": 9,
        "coloraxis.colorbar.orientation": "h",
        "coloraxis.colorbar.len": 0.9,
        "coloraxis.colorbar.lenmode": "fraction",
        "coloraxis.colorbar.x": 0.5,
        "coloraxis.colorbar.xanchor": "center",
        "coloraxis.colorbar.y": 1.0,
        "coloraxis.colorbar.yanchor": "bottom",
    }
    text = (
        "Each row is a weight, each cell a part of its columns (the inputs of a neuron). Dark on light, or bright on dark: "
        "many more chosen entries than the mean of that weight."
    )
    return Chart("map", "Where the chosen entries lie", text, figure, wide=True, narrow=narrow)


def _concentration(groups: list[Group]) -> Chart:
    figure = go.Figure()
    share = [i / _POINTS for i in range(_POINTS + 1)]
    for group in groups:
        curves = [layer.lorenz(_POINTS) for layer in group.members if layer.chosen]
        if not curves:
            continue
        curve = torch.stack(curves).mean(0).tolist()
        figure.add_scatter(
            x=share,
            y=[round(v, 4) for v in curve],
            mode="lines",
            name=escaped(group.label),
            meta={"colour": group.colour},
            hovertemplate="%{fullData.name}<br>%{y:.1%} of the entries in %{x:.0%} of the columns<extra></extra>",
        )
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "width": 1}, name="even", hoverinfo="skip")
    figure.update_layout(
        **SMALL,
        height=_height(figure),
        xaxis={"title": "share of the columns, fullest first", "tickformat": ".0%", "range": [0, 1]},
        yaxis={"title": "share of the chosen entries", "tickformat": ".0%", "range": [0, 1.01]},
    )
    text = (
        "The further above the dotted line, the fewer columns carry the choice, and the less of an input is kept to tune it."
    )
    return Chart("concentration", "Concentration in columns", text, figure)


def _distinct(layers: list[Layer], groups: list[Group]) -> Chart:
    values = [layer.distinct / layer.columns for layer in layers]
    figure = _by_layer(layers, groups, values, "columns used", ".0%")
    figure.update_layout(yaxis={"rangemode": "tozero"})
    return Chart("distinct", "Columns used", "Share of a weight's columns with at least one chosen entry.", figure)


def _density(layers: list[Layer], groups: list[Group]) -> Chart:
    text = "Share of a weight's entries that is chosen."
    densities = [layer.density for layer in layers]
    if logarithmic := max(densities) > 10 * statistics.median(densities):
        layers = [layer for layer in layers if layer.chosen]
        text += " The scale is logarithmic; weights without entries are left out."
    figure = _by_layer(layers, groups, [layer.density for layer in layers], "density", ".3~p")
    if logarithmic:
        figure.update_layout(yaxis={"type": "log", "dtick": 1})
    else:
        figure.update_layout(yaxis={"rangemode": "tozero"})
    return Chart("density", "Density", text, figure)


def _overlap(layers: list[Layer], groups: list[Group], against: str) -> Chart:
    both = [layer for layer in layers if layer.overlap is not None]
    figure = _by_layer(both, groups, [layer.overlap or 0.0 for layer in both], "overlap", ".0%")
    figure.update_layout(yaxis={"range": [0, 1.02]})
    text = f"Common entries over those of the smaller choice, with {against}."
    return Chart("overlap", "Overlap", text, figure)


def _by_layer(layers: list[Layer], groups: list[Group], values: list[float], what: str, form: str) -> go.Figure:
    """One line of points for each kind of weight, from the first layer to the last."""
    figure = go.Figure()
    place = {layer.name: i for i, layer in enumerate(layers)}
    value = dict(zip((layer.name for layer in layers), values, strict=True))
    for group in groups:
        if not (members := group.only(layers).members):
            continue
        figure.add_scatter(
            x=[place[m.name] for m in members],
            y=[value[m.name] for m in members],
            customdata=[escaped(m.name) for m in members],
            mode="lines+markers" if len(members) > 1 else "markers",
            marker={"size": 6},
            line={"width": 1.5},
            name=escaped(group.label),
            meta={"colour": group.colour},
            hovertemplate=f"%{{customdata}}<br>{what} %{{y:{form}}}<extra></extra>",
        )
    figure.update_layout(
        **SMALL,
        height=_height(figure),
        xaxis={
            "title": "weight, from input to output",
            "showgrid": False,
            "zeroline": False,
            "showticklabels": False,
            "ticks": "",
        },
        yaxis={"tickformat": form},
    )
    return figure


# ------------------------------------------------------------------------------------------------ of the run


def _curves(
    key: str, title: str, text: str, curves: list[tuple[str, list[float], list[float]]], form: str, ticks: str | None
) -> Chart:
    figure = _curve_figure(curves, form)
    epochs = max(x[-1] for _, x, _ in curves)
    axis = {"title": "epoch", "dtick": max(1, round(epochs / 8)), "range": [0, epochs * 1.03]}
    figure.update_layout(xaxis=axis, yaxis={"tickformat": ticks}, showlegend=len(curves) > 1)
    return Chart(key, title, text, figure)


def _curve_figure(curves: list[tuple[str, list[float], list[float]]], form: str) -> go.Figure:
    figure = go.Figure()
    for label, x, y in curves:
        few = len(x) <= 40
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers" if few else "lines",
            name=label,
            hovertemplate=f"%{{x:.4g}}: %{{y:{form}}}<extra>{label}</extra>",
        )
    figure.update_layout(**SMALL, height=_height(figure))
    return figure


def _height(figure: go.Figure) -> int:
    """Long names take a line each in the legend."""
    return 320 + 14 * len(figure.data)


SMALL: dict[str, Any] = {
    "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
    "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "xanchor": "left"},
}


def escaped(text: str) -> str:
    """A name as plotly shows it."""
    return html.escape(text, quote=False)
