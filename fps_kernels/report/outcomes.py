"""The charts of an evaluation: class by class, what is taken for what, and the images that a model is most wrong about."""

import base64
import html
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from fps_kernels.report.figures import SMALL, Chart, escaped
from fps_kernels.runs.folders import UnreadableImageError, read_image

if TYPE_CHECKING:
    from fps_kernels.runs.evaluation import Evaluation

MOST = 40
"""Classes in a chart: the worst ones, where there are more."""
_LABELLED = 20  # classes whose names all stand beside the map of what is taken for what
_SIDE = 160  # of the pictures, at most
_TAIL = 32  # letters of an image's path


def of_evaluation(found: "Evaluation") -> list[Chart]:
    """How each class does, and what it is taken for."""
    rows = [row for row in found.of_classes() if row["images"]]
    rows.sort(key=lambda row: (row["recall"], row["class"]))
    shown = rows[:MOST]
    which = "" if len(shown) == len(rows) else f" The {MOST} worst of {len(rows)} classes."
    return [_classes(shown, which, found.name), *_confusion(found, [row["class"] for row in shown], which)]


def _classes(rows: list[dict[str, object]], which: str, name: str) -> Chart:
    names = [escaped(str(row["class"])) for row in rows]
    figure = go.Figure()
    for key, label in (("recall", "found, of its images"), ("precision", "right, of what is taken for it")):
        figure.add_scatter(
            x=[row[key] for row in rows],
            y=names,
            customdata=[row["images"] for row in rows],
            mode="markers",
            marker={"size": 8, "symbol": "circle" if key == "recall" else "diamond-open"},
            name=label,
            hovertemplate=f"%{{y}}, %{{customdata:,}} images<br>{label}: %{{x:.1%}}<extra></extra>",
        )
    figure.update_layout(
        **SMALL,
        height=130 + 18 * len(rows),
        xaxis={"tickformat": ".0%", "range": [-0.02, 1.02]},
        yaxis={"autorange": "reversed", "type": "category", "dtick": 1, "tickfont": {"size": 10}},
    )
    return Chart("classes", "Class by class", f"On {name}.{which}", figure)


def _confusion(found: "Evaluation", shown: list[str], which: str) -> list[Chart]:
    names = [name for name in found.classes if name in set(shown)]
    if len(names) < 2:
        return []
    place = {name: i for i, name in enumerate(names)}
    counts = [[0] * len(names) for _ in names]
    totals = [0] * len(names)
    for label, guess, images in found.confusion:
        row = place.get(found.classes[label])
        if row is None:
            continue
        totals[row] += images
        if (column := place.get(found.classes[guess])) is not None:
            counts[row][column] = images
    labels = [escaped(name) for name in names]
    every = {"dtick": 1} if len(names) <= _LABELLED else {}  # of more, as many labels as there is room for
    shares = [[n / max(1, total) for n in row] for row, total in zip(counts, totals, strict=True)]
    most = max(map(max, shares))  # up to which colours go: those of many weak classes would all be pale
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=labels,
            y=labels,
            customdata=counts,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="%{y} taken for %{x}: %{customdata:,}, %{z:.1%} of its images<extra></extra>",
            text=[[str(n) if n and len(names) <= 12 else "" for n in row] for row in counts],
            texttemplate="%{text}",
        )
    )
    figure.update_layout(
        margin={"l": 8, "r": 20, "t": 8, "b": 8},
        height=150 + max(18 * len(names), 240),
        xaxis={"title": "taken for", "type": "category", **every, "tickangle": -60, "tickfont": {"size": 10}},
        yaxis={"title": "is", "type": "category", **every, "autorange": "reversed", "tickfont": {"size": 10}},
        coloraxis={
            "cmin": 0,
            "cmax": math.ceil(10 * max(most, 0.1)) / 10,
            "colorbar": {"tickformat": ".0%", "thickness": 12},
        },
    )
    text = f"Each row is a class, and what its images are taken for.{which}"
    return [Chart("confusion", "What is taken for what", text, figure, narrow={"coloraxis.showscale": False})]


def worst_images(found: "Evaluation") -> str:
    """A section with the mistakes of the highest loss; pictures where the images are files that are still there."""
    if not found.worst:
        return ""
    items = []
    for mistake in found.worst:
        picture = _picture(mistake.image)
        shown = f'<img alt="" src="data:image/jpeg;base64,{picture}">' if picture else ""
        text = f"<b>{_e(mistake.label)}</b> taken for <b>{_e(mistake.predicted)}</b> ({mistake.probability:.0%})"
        where = f'<span title="{_e(mistake.image)}">{_e(_tail(mistake.image))}</span>'
        items.append(f"<figure>{shown}<figcaption>{text}<br>{where}</figcaption></figure>")
    return (
        '<section class="card wide"><h2>Most wrong</h2>'
        "<p>The mistakes with the highest loss: look whether the label is right.</p>"
        f'<div class="pictures">{"".join(items)}</div></section>'
    )


def _picture(path: str) -> str | None:
    if not Path(path).is_file():
        return None
    try:
        image = read_image(Path(path), "RGB")
    except UnreadableImageError:
        return None
    image.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=80)
    return base64.b64encode(held.getvalue()).decode()


def _tail(path: str) -> str:
    """The file and as many of its folders as there is room for."""
    *folders, tail = Path(path).parts
    while folders and len(folders[-1]) + 1 + len(tail) <= _TAIL:
        tail = str(Path(folders.pop(), tail))
    return f"…/{tail}" if folders else tail


def _e(text: str) -> str:
    return html.escape(text, quote=True)
