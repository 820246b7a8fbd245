"""Why choices differ: ``python -m benchmarks.accuracy_analysis --data DIR [DIR ...] --checkpoint FILE --anchor DIR``.

Looks at the choices themselves, before any tuning, on the training images of each data set: how many columns they touch, how
much of what their columns carry varies between images (a constant input does only what a bias does), what share of the
dense gradient's energy they catch, and how far they agree with each other, with themselves under another seed, on another
half of the images and on another data set. Prints tables, writes ``benchmarks/results/accuracy_analysis.json``. What the
updates look like after tuning is in the results of ``benchmarks.accuracy``.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import ideas
from benchmarks.accuracy.methods import CHOICES, Occasion
from benchmarks.accuracy.runs import Settings, Workshop, fit_head, held_out
from benchmarks.shared import methods
from benchmarks.shared.measuring import save, table
from fps_kernels.selection import Selection

SEEDED = ("random", "GPS")
DEFAULT = ("random", "FPS", "GPS", "GD-FPS", "magnitude", "Wanda")


def gradient_energy(model: nn.Module, o: Occasion, batch_size: int = 20) -> dict[str, dict[str, Tensor]]:
    """Squared gradients of the cross-entropy, of every matrix in its own shape, float64.

    Args:
        model: with a head that is worth its gradients.
        o: whose training images are run through, in order of its seed.
        batch_size: images a step, as in training.

    Returns:
        ``"steps"``: the mean over steps of the squared gradient of a step's mean loss, which is what Adam sees;
        ``"whole"``: the squared gradient of the mean loss of all images.
    """
    model = methods.fresh(model).eval()
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("head.")}
    for name, p in model.named_parameters():
        p.requires_grad_(name in named)
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    steps = 0
    for x, y in o.task.batches(o.task.train, batch_size, torch.Generator().manual_seed(o.seed)):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps += 1
        for name, p in named.items():
            if p.grad is not None:
                squares[name] += p.grad.square()
                sums[name] += p.grad
    return {
        "steps": {name: s / steps for name, s in squares.items()},
        "whole": {name: (s / steps).square() for name, s in sums.items()},
    }


def caught(selection: Selection, energy: dict[str, Tensor]) -> float:
    """Share of the energy of the selected weights at the chosen entries."""
    matrices = {name: w.layout.matrix(energy[name]) for name, w in selection.items()}
    chosen = sum(float(matrices[name][w.rows().long(), w.columns.long()].sum()) for name, w in selection.items())
    return chosen / sum(float(matrix.sum()) for matrix in matrices.values())


def concentration(selection: Selection, known: dict[str, ideas.Moments]) -> dict[str, float]:
    """How a choice spreads, means over the weights.

    Returns:
        ``columns``: share of the columns with a chosen entry; ``densest_percent``: share of the entries in the densest one
        percent of the columns; ``varying``: over the chosen entries, the share of the input's mean square that is variance
        over tokens and images; ``between_images``: the share that is variance of the images' means.
    """
    columns, densest, varying, between = [], [], [], []
    for name, w in selection.items():
        C, m = w.layout.shape[1], known[name]
        counts = w.columns.long().bincount(minlength=C)
        columns.append(float((counts > 0).double().mean()))
        densest.append(float(counts.topk(max(1, round(C / 100))).values.sum() / counts.sum()))
        power = m.mean.square() + m.std.square()
        shares = [m.std.square() / power.clamp(min=1e-30), m.images.var(0) / power.clamp(min=1e-30)]
        varying.append(float(shares[0][w.columns.long()].mean()))
        between.append(float(shares[1][w.columns.long()].mean()))
    found = {"columns": columns, "densest_percent": densest, "varying": varying, "between_images": between}
    return {key: fmean(values) for key, values in found.items()}


def halves(o: Occasion) -> list[Occasion]:
    """The occasion with either half of its training images, nothing known of them."""
    first = held_out(o.task, 0, 0.5)
    second = replace(first, train=first.test, test=first.train)
    return [
        replace(o, task=task, known={"anchor": o.anchor_stats()} if o.anchor is not None else {}) for task in (first, second)
    ]


def analyse(o: Occasion, names: list[str]) -> tuple[list[dict[str, Any]], dict[str, Selection]]:
    """One row for every method, and the choices."""
    chosen = {name: CHOICES[name](o) for name in names}
    known = o.remember("moments", lambda: ideas.moments(o))
    energies = {"new head": gradient_energy(o.model, o), "fitted head": gradient_energy(fit_head(o), o)}
    parts = halves(o)
    rows = []
    for name, selection in chosen.items():
        row: dict[str, Any] = {"dataset": o.task.name, "k": o.k, "method": name, "chosen": selection.nnz}
        row |= concentration(selection, known)
        for head, energy in energies.items():
            row |= {f"gradient_{over}_{head.replace(' ', '_')}": caught(selection, e) for over, e in energy.items()}
        row["other_half"] = CHOICES[name](parts[0]).overlap(CHOICES[name](parts[1]))
        if name in SEEDED:
            row["other_seed"] = selection.overlap(CHOICES[name](replace(o, seed=o.seed + 1)))
        row["overlap"] = {other: selection.overlap(chosen[other]) for other in names}
        rows.append(row)
    return rows, chosen


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print the rows of one data set."""
    keys = [key for key in rows[0] if key not in ("dataset", "k", "method", "chosen", "overlap", "other_seed")]
    body = [[row["method"], *(f"{row[key]:.2%}" for key in keys), f"{row.get('other_seed', 1):.2%}"] for row in rows]
    print(f"\n{rows[0]['dataset']}, k={rows[0]['k']}, {rows[0]['chosen']:,} entries")
    print(table(["method", *(key.replace("_", " ") for key in keys), "other seed"], body))
    print("\ncommon entries")
    print(table(["", *names], [[row["method"], *(f"{row['overlap'][name]:.1%}" for name in names)] for row in rows]))


def main() -> None:
    """Analyse every data set, print and save."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_analysis", description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, nargs="+", required=True, help="folders with train/ and test/")
    p.add_argument("--checkpoint", type=Path)
    p.add_argument("--model", default="vit_small_patch14_dinov2")
    p.add_argument("--image-size", type=int, default=56)
    p.add_argument("--anchor", type=Path)
    p.add_argument("--methods", nargs="*", default=list(DEFAULT), choices=list(CHOICES), metavar="METHOD")
    p.add_argument("--k", type=int, default=4)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--name", default="accuracy_analysis", help="of the file in benchmarks/results")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    workshop = Workshop(Settings(options.model, options.checkpoint, options.image_size, 0, anchor=options.anchor))
    rows: list[dict[str, Any]] = []
    per_set: dict[str, dict[str, Selection]] = {}
    for directory in options.data:
        found, per_set[directory.name] = analyse(workshop.occasion(directory, options.k, seed=1), options.methods)
        show(found, options.methods)
        rows += found
    first, *others = per_set
    for other in others:
        for row in rows:
            if row["dataset"] == other:
                row["other_dataset"] = per_set[first][row["method"]].overlap(per_set[other][row["method"]])
        shared = {row["method"]: f"{row['other_dataset']:.1%}" for row in rows if row["dataset"] == other}
        print(f"\ncommon to {first} and {other}: {shared}")
    save(options.name, "python -m benchmarks.accuracy_analysis", rows)
