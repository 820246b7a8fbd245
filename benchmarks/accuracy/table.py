"""The tables of ``benchmarks.accuracy``: means, standard errors, and paired differences with their confidence intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from scipy import stats

from benchmarks.accuracy.lines import Line, from_bits
from benchmarks.shared.measuring import table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty, in the unit of the values.

    Attributes:
        mean: of the values.
        error: standard error of the mean; NaN of a single value.
        half: half the width of the 95 % confidence interval.
        count: values.
    """

    mean: float
    error: float
    half: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        """Mean of independent values, with Student's t."""
        n = len(values)
        if n < 2:
            return cls(values[0] if values else math.nan, math.nan, math.nan, n)
        error = stdev(values) / math.sqrt(n)
        return cls(fmean(values), error, float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error, n)

    def percent(self) -> str:
        """``mean ± standard error`` in percent."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.error:.1f}" if self.count > 1 else "")

    def interval(self) -> str:
        """``mean [lower, upper]`` in percentage points."""
        if self.count < 1:
            return "–"
        if self.count < 2:
            return f"{100 * self.mean:+.1f}"
        return f"{100 * self.mean:+.1f} [{100 * (self.mean - self.half):+.1f}, {100 * (self.mean + self.half):+.1f}]"


def of_split(lines: Iterable[Line], split: str) -> list[Line]:
    """The lines of one split."""
    return [line for line in lines if line["split"] == split]


def _cells(lines: Iterable[Line], method: str, ks: set[int]) -> dict[tuple[str, int, int], Line]:
    """A method's runs by data set, budget and seed; a method without a budget stands in every budget's cell."""
    found = {}
    for line in lines:
        if line["method"] == method:
            for k in ks if line["k"] is None else {line["k"]} & ks:
                found[line["dataset"], k, line["seed"]] = line
    return found


def paired_runs(lines: list[Line], method: str, baseline: str, ks: set[int]) -> Estimate:
    """Difference in accuracy to a baseline, paired over data set, budget and seed.

    A method without a budget has one run for all budgets: then those of the other are averaged first, and count once.

    Args:
        lines: of one split.
        method: minuend.
        baseline: subtrahend.
        ks: budgets that count.
    """
    mine, theirs = _cells(lines, method, ks), _cells(lines, baseline, ks)
    pairs: dict[tuple[str, int | None, int], list[float]] = defaultdict(list)
    for cell in sorted(mine.keys() & theirs.keys()):
        dataset, k, seed = cell
        shared = mine[cell]["k"] is None or theirs[cell]["k"] is None
        pairs[dataset, None if shared else k, seed].append(mine[cell]["accuracy"] - theirs[cell]["accuracy"])
    return Estimate.of([fmean(differences) for differences in pairs.values()])


def paired_images(lines: list[Line], method: str, baseline: str, ks: set[int]) -> Estimate:
    """The same difference, with its uncertainty from the choice of the test images.

    Per image the difference of being right, averaged over the budgets and seeds that both have; then the mean over the
    images of a data set, and over data sets with equal weight. Runs count as given: only images are a sample.
    """
    mine, theirs = _cells(lines, method, ks), _cells(lines, baseline, ks)
    per_set: dict[str, list[torch.Tensor]] = defaultdict(list)
    for cell in mine.keys() & theirs.keys():
        a, b = (from_bits(c[cell]["bits"], c[cell]["total"]).double() for c in (mine, theirs))
        per_set[cell[0]].append(a - b)
    means, variances, images = [], [], 0
    for differences in per_set.values():
        per_image = torch.stack(differences).mean(0)
        means.append(float(per_image.mean()))
        variances.append(float(per_image.var()) / len(per_image))
        images += len(per_image)
    if not means:
        return Estimate.of([])
    error = math.sqrt(sum(variances)) / len(means)
    return Estimate(fmean(means), error, float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * error, images)


def _order(lines: list[Line]) -> list[str]:
    """Methods, best first, by their mean lead over the one with most runs, in the data sets, budgets and seeds of both."""
    ks = {line["k"] for line in lines if line["k"] is not None} or {0}
    cells: dict[str, dict[tuple[str, int, int], float]] = defaultdict(dict)
    for line in lines:
        for k in ks if line["k"] is None else {line["k"]}:
            cells[line["method"]][line["dataset"], k, line["seed"]] = line["accuracy"]
    common = max(cells.values(), key=len)

    def lead(method: str) -> float:
        both = cells[method].keys() & common.keys()
        return fmean(cells[method][cell] - common[cell] for cell in both) if both else -1.0

    return sorted(cells, key=lead, reverse=True)


def accuracy_rows(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Mean test accuracy and its standard error over seeds, by method, data set and budget."""
    datasets = sorted({line["dataset"] for line in lines})
    ks = sorted({line["k"] for line in lines if line["k"] is not None})
    columns = [(dataset, k) for dataset in datasets for k in ks]
    body = []
    for method in _order(lines):
        row = [method]
        for dataset, k in columns:
            cell = [
                line for line in lines if (line["method"], line["dataset"]) == (method, dataset) and line["k"] in (None, k)
            ]
            value = Estimate.of([line["accuracy"] for line in cell])
            row.append(f"{value.percent()} ({value.count})" if cell else "–")
        rates = [
            "/".join(f"{lr:g}" for lr in sorted({c["lr"] for c in lines if c["method"] == method and c["dataset"] == d}))
            for d in datasets
        ]
        trained = [
            f"{min(c['trained'] for c in lines if c['method'] == method and c['k'] in (None, k)):,}"
            if any(c["method"] == method and c["k"] in (None, k) for c in lines)
            else "–"
            for k in ks
        ]
        body.append([*row, *rates, *trained])
    head = ["method", *(f"{d} k={k}" for d, k in columns), *(f"lr {d}" for d in datasets), *(f"trained k={k}" for k in ks)]
    return head, body


def difference_rows(lines: list[Line], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Paired differences to a baseline in percentage points, by method and budget."""
    ks = sorted({line["k"] for line in lines if line["k"] is not None})
    scopes = [{k} for k in ks] + ([set(ks)] if len(ks) > 1 else [])
    body = []
    for method in _order(lines):
        if method == baseline:
            continue
        row = [method]
        for scope in scopes:
            runs = paired_runs(lines, method, baseline, scope)
            images = paired_images(lines, method, baseline, scope)
            row += [f"{runs.interval()} ({runs.count})", f"± {100 * images.half:.1f}" if images.count else "–"]
        body.append(row)
    names = [",".join(map(str, sorted(scope))) for scope in scopes]
    return ["method", *(part for n in names for part in (f"k={n}: over runs (pairs)", "over images"))], body


def fewer_bits_rows(lines: list[Line], like: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Methods that keep their activations in fewer bits, each beside the same one that does not.

    Args:
        lines: of one split.
        like: that other method, by each of these.
    """
    ks = {line["k"] for line in lines if line["k"] is not None} or {0}
    datasets = sorted({line["dataset"] for line in lines if line["method"] in like})
    body = []
    for method, other in like.items():
        if all(line["method"] != method for line in lines):
            continue
        row = [method]
        for dataset in datasets:
            here = [line for line in lines if line["dataset"] == dataset]
            mine, theirs = _cells(here, method, ks), _cells(here, other, ks)
            both = mine.keys() & theirs.keys()
            found = (Estimate.of([c[cell]["accuracy"] for cell in both]) for c in (mine, theirs))
            row.append(" / ".join(estimate.percent() for estimate in found) if both else "–")
        runs, images = (paired(lines, method, other, ks) for paired in (paired_runs, paired_images))
        row += [other, f"{runs.interval()} ({runs.count})", f"± {100 * images.half:.1f}" if images.count else "–"]
        body.append(row)
    head = ["method", *(f"{d}, its % / the other's" for d in datasets), "the other", "difference (pairs)", "over images"]
    return head, body


def update_rows(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """What the updates look like, means over all runs of a method and budget."""
    keys = ("effective_rank", "rank_share", "columns", "largest_column", "relative_norm")
    groups: dict[tuple[str, Any], list[Line]] = defaultdict(list)
    for line in lines:
        if line["update"]:
            groups[line["method"], line["k"]].append(line)
    body = []
    for (method, k), found in sorted(groups.items(), key=lambda item: (str(item[0][1]), item[0][0])):
        means = [fmean(line["update"][key] for line in found) for key in keys]
        losses = [fmean(line[key] for line in found) for key in ("train_loss", "loss")]
        body.append([method, str(k or "–"), *(f"{value:.3g}" for value in means), *(f"{value:.3f}" for value in losses)])
    return ["method", "k", *(key.replace("_", " ") for key in keys), "train loss", "test loss"], body


def concentration_rows(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Whether methods whose updates are spread wider are better: Spearman's rank correlation over methods.

    Args:
        lines: of one split, all methods in the same data sets.
    """
    changed = [line for line in lines if line["update"]]
    means = {d: fmean(c["accuracy"] for c in changed if c["dataset"] == d) for d in {line["dataset"] for line in changed}}
    methods = sorted({line["method"] for line in changed})
    lead = [fmean(c["accuracy"] - means[c["dataset"]] for c in changed if c["method"] == m) for m in methods]
    names = {
        "columns": "columns that changed",
        "largest_column": "largest column's share of the change",
        "effective_rank": "effective rank",
        "relative_norm": "size of the change",
    }
    body = []
    for key, name in names.items():
        values = [fmean(c["update"][key] for c in changed if c["method"] == m) for m in methods]
        found = stats.spearmanr(values, lead)
        body.append([name, f"{found.statistic:+.2f}", f"{found.pvalue:.2f}", str(len(methods))])
    return ["update", "rank correlation with accuracy", "p", "methods"], body


def search_rows(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Accuracy on held-out training images, by method, rate and data set."""
    found = of_split(lines, "search")
    datasets = sorted({line["dataset"] for line in found})
    groups: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in found:
        groups[line["method"], line["lr"]][line["dataset"]].append(line["accuracy"])
    body = [
        [method, f"{lr:g}", *(f"{100 * fmean(cell[d]):.1f} ({len(cell[d])})" if cell[d] else "–" for d in datasets)]
        for (method, lr), cell in sorted(groups.items())
    ]
    return ["method", "lr", *datasets], body


def render(lines: list[Line]) -> str:
    """All tables as text.

    Args:
        lines: of a results file.
    """
    tested = of_split(lines, "test")
    parts = [f"{len(tested)} test runs and {len(lines) - len(tested)} runs on training images\n"]
    if tested:
        parts += ["Percent of the test images, mean ± standard error over seeds (runs):", table(*accuracy_rows(tested)), ""]
        for baseline in ("random", "GPS", "biases+head"):
            if any(line["method"] == baseline for line in tested):
                title = f"Paired differences to {baseline}, percentage points, mean and 95 % confidence interval:"
                parts += [title, table(*difference_rows(tested, baseline)), ""]
        if any(line["update"] for line in tested):
            parts += ["Updates of the matrices in the blocks:", table(*update_rows(tested)), ""]
    if screened := of_split(lines, "screen"):
        parts += ["Screening on halves of the training images, percent, and difference to random in percentage points:"]
        parts += [table(*accuracy_rows(screened)), "", table(*difference_rows(screened, "random")), ""]
        if len({line["method"] for line in screened if line["update"]}) > 2:
            parts += ["Over these methods:", table(*concentration_rows(screened)), ""]
    if len(tested) < len(lines):
        parts += ["Percent of held-out training images, by learning rate:", table(*search_rows(lines))]
    return "\n".join(parts)
