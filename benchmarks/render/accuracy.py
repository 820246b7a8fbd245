"""The tables of ``benchmarks.render`` that are about accuracy, from ``benchmarks/results/accuracy*``."""

from collections import defaultdict

from benchmarks.accuracy import table as accuracy_table
from benchmarks.accuracy.ideas import IDEAS
from benchmarks.accuracy.lines import COARSER, FEWER_BITS, read
from benchmarks.render import tables
from benchmarks.render.tables import Content, Row, markdown, source

IN_BFLOAT16 = "FPS, bfloat16 weights"
# The least that a data set must have before its accuracies are shown in the README.
NEEDED = {"random", "FPS", "GPS", "linear", "full"}


def accuracy_lines() -> list[Row]:
    """The runs of ``accuracy.jsonl``."""
    return read(tables.RESULTS / "accuracy.jsonl")


def _accuracy_source(lines: list[Row]) -> str:
    def every(key: str) -> str:
        return ", ".join(sorted({str(line[key]) for line in lines}))

    settings = f"{every('model')}, {every('image_size')} pixels, {every('epochs')} epochs, batch {every('batch_size')}"
    made = f"{every('processor')}, torch {every('torch')}, commit {every('commit')}, {every('date')}"
    return f"<sub>`python -m benchmarks.accuracy`: {settings}; {made}</sub>"


def in_all_bits(lines: list[Row]) -> list[Row]:
    """The test runs of methods that keep their activations as they are."""
    return [line for line in accuracy_table.of_split(lines, "test") if line["method"] not in {**FEWER_BITS, **COARSER}]


def fewer_bits(lines: list[Row]) -> str | None:
    """What it costs in accuracy to keep activations in fewer bits; ``None`` if nobody tried."""
    table = _beside_others(lines, FEWER_BITS)
    if table is None:
        return None
    note = (
        "Activations kept in fewer bits, at the learning rates that were found without: percent of the test images, mean ± "
        "standard error over seeds, and the paired difference in percentage points with its 95 % confidence interval over "
        "runs, and its half-width over test images."
    )
    shown = [line for line in accuracy_table.of_split(lines, "test") if line["method"] in FEWER_BITS]
    return "\n\n".join([note, table, _accuracy_source(shown)])


def coarser(lines: list[Row]) -> str | None:
    """What bfloat16 costs in accuracy, and how many chosen entries it hides the change of; ``None`` if nobody tried."""
    table = _beside_others(lines, COARSER)
    if table is None:
        return None
    note = (
        "bfloat16, at the learning rates that were found in float32: weights in bfloat16 with float32 master values of the "
        "chosen entries, and float32 weights multiplied in bfloat16 (autocast). Percent of the test images and differences "
        "as above:"
    )
    also = (
        "Chosen entries of bfloat16 weights that show after training what they showed before, although their master values "
        "moved (means over runs), and accuracy on held-out halves of the training images at the same rate:"
    )
    shown = [line for line in lines if _of_bfloat16(line)]
    return "\n\n".join([note, table, also, _unmoved(lines, shown), _accuracy_source(shown)])


def _beside_others(lines: list[Row], like: dict[str, str]) -> str | None:
    head, body = accuracy_table.fewer_bits_rows(accuracy_table.of_split(lines, "test"), like)
    return markdown(head, body) if body else None


def _unmoved(lines: list[Row], shown: list[Row]) -> str:
    """By data set and learning rate."""
    held_out: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for line in accuracy_table.of_split(lines, "screen"):
        held_out[line["dataset"], line["lr"]].append(line)
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for line in shown:
        groups[line["dataset"], line["lr"]].append(line)
    rows = []
    for (dataset, lr), own in sorted(groups.items(), key=lambda group: (group[0][0], -group[0][1])):
        seeds = {line["seed"] for line in own if line["split"] == "screen"}
        accuracies: dict[str, list[float]] = defaultdict(list)
        for line in held_out[dataset, lr]:
            if line["seed"] in seeds:
                accuracies[line["method"]].append(line["accuracy"])
        unmoved = [line["update"]["unmoved"] for line in own if line["method"] == IN_BFLOAT16]
        rows.append([dataset, f"{lr:g}", _mean(accuracies["FPS"]), _mean(accuracies[IN_BFLOAT16]), _mean(unmoved)])
    names = ["data set", "lr", "float32", "bfloat16 weights", "chosen entries that look unmoved"]
    return markdown(names, rows, left=1)


def _of_low_rate(line: Row) -> bool:
    return line["split"] == "screen" and line["method"] == "FPS" and "unmoved" in line["update"]


def _of_bfloat16(line: Row) -> bool:
    """Whether a run on halves of the training images was made to compare with bfloat16."""
    return line["method"] in COARSER or _of_low_rate(line)


def _mean(shares: list[float]) -> str:
    return f"{sum(shares) / len(shares):.1%}" if shares else "–"


def rates(lines: list[Row]) -> str | None:
    """Which learning rates were found for each budget of FPS; ``None`` if nobody sought them."""
    found = [line for line in accuracy_table.of_split(lines, "search") if line["method"] == "FPS"]
    if len({line["k"] for line in found}) < 2:
        return None
    every = sorted({line["lr"] for line in found})
    body = []
    for dataset in dict.fromkeys(line["dataset"] for line in found):
        for k in sorted({line["k"] for line in found}):
            losses = {line["lr"]: line["loss"] for line in found if (line["dataset"], line["k"]) == (dataset, k)}
            best = min(losses, key=lambda lr: losses[lr], default=None)
            cells = [f"{losses[lr]:.3f}" if lr in losses else "–" for lr in every]
            body.append([dataset, str(k), *(f"**{c}**" if lr == best else c for lr, c in zip(every, cells, strict=True))])
    note = (
        "Learning rates of FPS by budget: mean cross-entropy on 30 % of the training images, held out (seed 1), with the "
        "best in bold. The more entries move, the less far each should. `fps-kernels tune` takes 1e-3 up to k = 8, 3e-4 up "
        "to k = 32 and 1e-4 beyond, unless `--lr` says otherwise:"
    )
    return "\n\n".join(
        [note, markdown(["data set", "k", *(f"{lr:g}" for lr in every)], body, left=1), _accuracy_source(found)]
    )


def accuracy(lines: list[Row]) -> str | None:
    """Test accuracy in the data sets in which the methods that everything is compared with were run; else ``None``.

    Ideas that were only tried are left to the page.
    """
    tested = [line for line in in_all_bits(lines) if line["method"] not in IDEAS]
    datasets = {line["dataset"] for line in tested}
    fit = {d for d in datasets if {line["method"] for line in tested if line["dataset"] == d} >= NEEDED}
    shown = [line for line in tested if line["dataset"] in fit]
    if not shown:
        return None
    head, body = accuracy_table.accuracy_rows(shown)
    kept = [i for i, name in enumerate(head) if not name.startswith(("lr ", "trained "))]
    made = markdown([head[i] for i in kept], [[row[i] for i in kept] for row in body])
    note = "Percent of the test images, mean ± standard error over seeds (runs); learning rates chosen on training images."
    return "\n\n".join(part for part in (made, note, lead(shown, "FPS"), _accuracy_source(shown)) if part)


def lead(tested: list[Row], method: str) -> str:
    """What a method gains over every other, in words: means over the runs that both have, with their intervals."""
    ks = {line["k"] for line in tested if line["k"] is not None}
    found = []
    for other in dict.fromkeys(line["method"] for line in tested):
        gain = accuracy_table.paired_runs(tested, method, other, ks)
        if other != method and gain.count > 1:
            found.append((gain.mean, f"{other} {gain.interval()} ({gain.count})"))
    if not found:
        return ""
    gains = ", ".join(text for _, text in sorted(found))
    return (
        f"{method} minus each other method in percentage points, over all of these data sets and budgets, with the 95 % "
        f"confidence interval over pairs of runs, and their number: {gains}."
    )


def clear_winners(tested: list[Row]) -> str:
    """Which methods are better than both random entries and GPS beyond chance, in words."""
    ks = {line["k"] for line in tested if line["k"] is not None}
    others = [name for name in dict.fromkeys(line["method"] for line in tested) if name not in ("random", "GPS")]

    def ahead(method: str) -> bool:
        leads = [accuracy_table.paired_runs(tested, method, baseline, ks) for baseline in ("random", "GPS")]
        return all(lead.count > 1 and lead.mean > 2 * lead.error for lead in leads)

    winners = [name for name in others if ahead(name)]
    return (
        "Ahead of both random entries and GPS by more than twice the standard error of the paired difference, over all of "
        f"these data sets and budgets: {', '.join(winners) or 'none'} of the {len(others)} other methods."
    )


def accuracy_details(lines: list[Row]) -> str:
    """Everything that ``accuracy.jsonl`` shows: accuracies, paired differences, updates, and screening."""
    parts = []
    if tested := in_all_bits(lines):
        parts += ["Percent of the test images, mean ± standard error over seeds (runs):"]
        parts += [markdown(*accuracy_table.accuracy_rows(tested))]
        for baseline in ("random", "GPS"):
            if any(line["method"] == baseline for line in tested):
                parts += [
                    f"Paired differences to {baseline} in percentage points, mean and 95 % confidence interval over runs, "
                    "and its half-width over test images:",
                    markdown(*accuracy_table.difference_rows(tested, baseline)),
                ]
        parts += [
            clear_winners(tested),
            "Updates of the matrices in the blocks:",
            markdown(*accuracy_table.update_rows(tested)),
        ]
        parts += [_accuracy_source(tested)]
    if made := fewer_bits(lines):
        parts.append(made)
    parts += [made for made in (coarser(lines), rates(lines)) if made is not None]
    if screened := [line for line in accuracy_table.of_split(lines, "screen") if not _of_bfloat16(line)]:
        parts += [
            "Ideas for a better choice, compared on halves of the training images, all at one learning rate "
            "(difference to random as above):",
            markdown(*accuracy_table.accuracy_rows(screened)),
            markdown(*accuracy_table.difference_rows(screened, "random")),
        ]
        if len({line["method"] for line in screened if line["update"]}) > 2:
            parts += [
                "Does it cost accuracy to change few columns? Spearman's rank correlation over these methods:",
                markdown(*accuracy_table.concentration_rows(screened)),
            ]
        parts.append(_accuracy_source(screened))
    return "\n\n".join(parts)


def analysis(content: Content) -> str:
    """How choices spread and what they catch, before any tuning."""
    columns = {
        "columns": "columns touched",
        "densest_percent": "in the densest 1 % of columns",
        "between_images": "input varies between images",
        "gradient_steps_fitted_head": "of the gradient's energy",
        "other_half": "same on other images",
    }
    body = [
        [row["dataset"], str(row["k"]), row["method"], *(f"{row[key]:.1%}" if key in row else "–" for key in columns)]
        for row in content["rows"]
    ]
    return "\n\n".join([markdown(["data set", "k", "choice", *columns.values()], body, left=1), source(content)])
