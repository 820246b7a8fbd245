"""Which models can be chosen from and tuned: ``python -m benchmarks.coverage [--family NAME ...] [--match TEXT]``.

Models of timm, torchvision, transformers, open_clip and diffusers are built from their configurations, without weights;
those of transformers and diffusers are made small. Of each: ``select`` with two entries a neuron, ``attach``, the gradients
of the chosen entries against the dense ones, three steps, a delta file, and its way back. Written to
``results/coverage.json``.
"""

import argparse
import json
from dataclasses import fields
from typing import Any

import torch
import tqdm

from benchmarks.coverage.checks import Outcome, examine
from benchmarks.coverage.zoo import families
from benchmarks.shared.measuring import RESULTS, save, table


def line(outcome: Outcome) -> list[str]:
    """Of the table that is printed."""
    failed = [name for name, held in outcome.checks.items() if not held]
    reason, share = max(outcome.skipped.items(), key=lambda item: item[1], default=("", 0.0))
    return [
        outcome.family,
        outcome.model,
        f"{outcome.entries / 1e6:.2f}",
        f"{outcome.eligible:.1%}" if outcome.entries else "–",
        outcome.error or ", ".join(failed) or "all",
        f"{outcome.choose:.2f}",
        f"{outcome.choose / outcome.pass_:.1f}" if outcome.pass_ else "–",
        f"{outcome.tune:.2f}",
        f"{share:.1%}: {reason}"[:60] if share > 0.01 else "",
    ]


HEAD = ["library", "model", "M entries", "eligible", "checks", "choose, s", "over a pass", "3 steps, s", "mostly left out"]


def known() -> list[dict[str, Any]]:
    """Rows of the results file."""
    path = RESULTS / "coverage.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main(arguments: list[str] | None = None) -> None:
    """Examine, print, and write what was found beside what is known of other models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=list(families()), help="libraries; all without it")
    parser.add_argument("--match", default="", help="only models whose name has this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    wanted = [
        (family, name, make)
        for family, zoo in families().items()
        for name, make in zoo.items()
        if (not options.family or family in options.family) and options.match in name
    ]
    found = []
    for family, name, make in tqdm.tqdm(wanted, mininterval=5):
        found.append(examine(family, name, make))
        tqdm.tqdm.write("  ".join(line(found[-1])))
        if not options.keep:
            write(found[-1])
    print(table(HEAD, [line(outcome) for outcome in found]))


def write(outcome: Outcome) -> None:
    """Put a row into the results file, in the order of the models; those that are tried no more go."""
    columns = {field.name for field in fields(Outcome)}
    rows = {(row["family"], row["model"]): row for row in known() if columns == row.keys()}
    rows[outcome.family, outcome.model] = outcome.row()
    order = [(family, name) for family, zoo in families().items() for name in zoo]
    save("coverage", "python -m benchmarks.coverage", [rows[key] for key in order if key in rows])
