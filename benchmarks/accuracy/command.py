"""Accuracy of every way of tuning: ``python -m benchmarks.accuracy --data DIR [DIR ...] --checkpoint FILE --anchor DIR``.

VTAB-1k's protocol: tune on the training images of ``DIR/train``, measure on all of ``DIR/test``. The learning rate of each
method and data set is climbed to on 30 % of the training images held out (k=4, seed 1; steps of about a factor of three,
until both neighbours are worse), by the mean cross-entropy there: which of 300 images are right is half chance. The test
images never choose anything. A method that keeps its activations in fewer bits takes the rate of the same one that does
not. Float32; no augmentation; AdamW with a warm-up over a fifth of the steps and a cosine after it;
the new head learns at the same rate in every method.

``--screen RATE`` only compares on training images, all methods at one rate: that is how ideas are sorted out before any test
image is looked at. One half of them, drawn by the seed, is tuned on, the other measured on, with as many steps as in a
search.

``--search`` only seeks rates, at each budget that ``--k`` names: the command line's own rate for a budget comes from there.

Every finished run is one line of ``benchmarks/results/accuracy.jsonl``; started again, the script does what is missing.
Several processes may share the file if they are given different ``--data``. ``--table`` prints what the file holds.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy import table
from benchmarks.accuracy.lines import Line, append, read
from benchmarks.accuracy.methods import HEAD_LR, METHODS, STANDARD
from benchmarks.accuracy.runs import Settings, Workshop, run
from benchmarks.shared.measuring import RESULTS, machine

SEARCH_K, SEARCH_SEED = 4, 1
HELD_OUT = {"search": 0.3, "screen": 0.5, "test": None}  # share of the training images to measure on
FIRST = ("random", "FPS", "GPS", "GD-FPS", "magnitude")


@dataclass(frozen=True)
class Job:
    """One run that is wanted.

    Attributes:
        split: ``"search"`` finds the rate on held-out training images, ``"screen"`` compares on more of them at
            a given rate, ``"test"`` measures on the test images.
        dataset: name of the folder.
        method: which one.
        k: entries per neuron; ``None`` for methods that have no budget.
        seed: of everything drawn, and of the images held out.
    """

    split: str
    dataset: str
    method: str
    k: int | None
    seed: int


def searched(lines: Iterable[Line], dataset: str, method: str, k: int | None = SEARCH_K) -> dict[float, float]:
    """The loss on the held-out images that each rate of a method's search led to, at a budget."""
    return {
        line["lr"]: line["loss"]
        for line in lines
        if (line["split"], line["dataset"], line["method"], line["seed"]) == ("search", dataset, method, SEARCH_SEED)
        and line["k"] in (None, k)
    }


def next_rate(found: dict[float, float], rates: tuple[float, ...], start: float) -> float | None:
    """The next rate to try: the first one, then the neighbours of the best; ``None`` when those are known."""
    if start not in found:
        return start
    i = rates.index(best_rate(found, rates))
    return next((rates[j] for j in (i - 1, i + 1) if 0 <= j < len(rates) and rates[j] not in found), None)


def best_rate(found: dict[float, float], rates: tuple[float, ...]) -> float:
    """The best of the rates that were tried."""
    return min((rate for rate in rates if rate in found), key=lambda rate: found[rate])


def jobs(
    datasets: list[str], names: list[str], seeds: list[int], ks: list[int], screen: bool, search: bool = False
) -> Iterator[Job]:
    """Everything wanted, the most informative first; a method's search comes before its first test."""
    if search:
        for k, name, dataset in itertools.product(ks, names, datasets):
            yield Job("search", dataset, name, k if METHODS[name].per_k else None, SEARCH_SEED)
        return
    groups = [[name for name in names if (name in FIRST) == first] for first in (True, False)]
    if screen:
        for seed, name, dataset in itertools.product(seeds, names, datasets):
            yield Job("screen", dataset, name, SEARCH_K if METHODS[name].per_k else None, seed)
        return
    for seed, group in itertools.product(seeds, groups):
        for name, dataset in itertools.product(group, datasets):
            k = ks[0] if METHODS[name].per_k else None
            if seed == seeds[0]:
                yield Job("search", dataset, METHODS[name].like or name, k and SEARCH_K, SEARCH_SEED)
            yield Job("test", dataset, name, k, seed)
    for k, seed, name, dataset in itertools.product(ks[1:], seeds, names, datasets):
        if METHODS[name].per_k:
            yield Job("test", dataset, name, k, seed)


class Work:
    """Does jobs and writes their lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.settings = Settings(
            options.model, options.checkpoint, options.image_size, options.epochs, options.batch_size, options.anchor
        )
        self.shared = {key: getattr(self.settings, key) for key in ("model", "image_size", "epochs", "batch_size")}
        self.folders = {path.name: path for path in options.data}
        self.results: Path = options.results
        self.screen_rate: float = options.screen
        self.workshop, self.where = Workshop(self.settings), machine()

    def lines(self) -> list[Line]:
        """What is known in these settings."""
        return [line for line in read(self.results) if all(line[key] == value for key, value in self.shared.items())]

    def missing(self, job: Job) -> Iterator[float]:
        """The rates at which a job has yet to be run."""
        method = METHODS[job.method]
        if job.split == "search":
            while (
                rate := next_rate(searched(self.lines(), job.dataset, job.method, job.k), method.rates, method.start)
            ) is not None:
                yield rate
            return
        rate = self.screen_rate
        if job.split == "test":
            rate = best_rate(searched(self.lines(), job.dataset, method.like or job.method), method.rates)
        done = {
            (line["split"], line["dataset"], line["method"], line["k"], line["seed"], line["lr"]) for line in self.lines()
        }
        if (job.split, job.dataset, job.method, job.k, job.seed, rate) not in done:
            yield rate

    def run(self, job: Job, lr: float) -> None:
        """One run and its line."""
        share = HELD_OUT[job.split]
        occasion = self.workshop.occasion(self.folders[job.dataset], job.k or SEARCH_K, job.seed, share)
        epochs = self.settings.epochs
        if job.split == "screen":
            epochs = round(epochs * (1 - HELD_OUT["search"]) / (1 - HELD_OUT["screen"]))
        outcome = run(job.method, occasion, lr, epochs, self.settings.batch_size)
        line = {**asdict(job), "lr": lr, "head_lr": HEAD_LR, **self.shared}
        append(
            self.results, {**line, **outcome, **{key: self.where[key] for key in ("torch", "processor", "commit", "date")}}
        )
        tqdm.write(f"{job.split} {job.dataset} {job.method} k={job.k} seed={job.seed} lr={lr:g}: {outcome['accuracy']:.1%}")


def work(options: argparse.Namespace) -> None:
    """Do what is missing until it is done or the time is over."""
    deadline = time.monotonic() + 60 * options.time_limit if options.time_limit is not None else float("inf")
    todo = Work(options)
    screened, searched_only = options.screen is not None, options.search
    wanted = list(jobs(list(todo.folders), options.methods, options.seeds, options.k, screened, searched_only))
    for job in tqdm(wanted, desc="runs", mininterval=10):
        for rate in todo.missing(job):
            if time.monotonic() > deadline:
                tqdm.write("the time is over: the same command goes on from here")
                return
            todo.run(job, rate)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, nargs="*", default=[], help="folders with train/ and test/")
    p.add_argument("--checkpoint", type=Path, help="safetensors file with timm's keys; without it weights are random")
    p.add_argument("--model", default="vit_small_patch14_dinov2", help="timm's name")
    p.add_argument("--image-size", type=int, default=56)
    p.add_argument("--methods", nargs="*", default=list(STANDARD), choices=list(METHODS), metavar="METHOD")
    p.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    p.add_argument("--k", type=int, nargs="*", default=[4, 1], help="entries per output neuron")
    p.add_argument("--anchor", type=Path, help="folder of images like those of the pre-training, for GD-FPS")
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--batch-size", type=int, default=20)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--time-limit", type=float, help="minutes after which no further run is begun")
    p.add_argument("--results", type=Path, default=RESULTS / "accuracy.jsonl")
    p.add_argument("--screen", type=float, metavar="RATE", help="compare at one rate, on training images only")
    p.add_argument("--search", action="store_true", help="only seek the rates of the methods, at each --k")
    p.add_argument("--table", action="store_true", help="print what the results file holds, run nothing")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Run, or print the table."""
    p = parser()
    options = p.parse_args(arguments)
    if options.table:
        print(table.render(read(options.results)))
        return
    if not options.data:
        p.error("give at least one folder as --data, or --table to print what was measured")
    if missing := [path for path in options.data if not path.is_dir()]:
        p.error(f"there is no folder {missing[0]}")
    if "GD-FPS" in options.methods and options.anchor is None:
        p.error("GD-FPS needs --anchor, a folder of images like those of the pre-training; or leave it out of --methods")
    torch.set_num_threads(options.threads)
    work(options)
