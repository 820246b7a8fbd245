"""Two commits side by side: ``make compare BASE=<commit>``, or ``python -m benchmarks.compare <commit>``.

Each commit is checked out under ``build/compare``, its native library is built there, and its quick benchmarks run in
processes of their own, with its own sources. The commits take turns (base, head, head, base, base, …), so that neither
always runs on a machine that the other has warmed up. Head is the working tree: its tracked files as they are now.

What is compared:

* **Times**, by the median over the rounds of head / base within a round. A time fails beyond 5 % plus the noise.
* **Bytes**, exactly. A benchmark counts the bytes of live tensors, which have no noise: one byte more fails. Where rounds of
  one commit differ all the same, only what lies above every round of the base counts as more.
* A figure that only one commit has is listed and not compared.

The noise of a time is what the rounds of a commit say about each other, since nothing changes between them: the median of
``|ln(x_i / x_j)|`` over all pairs of rounds of the same commit, of both commits together. For normal noise that is 0.954
standard deviations of a round; it is a median, so that one disturbed round does not hide a slowdown. The median of n ratios
has a standard error of about 1.2533 √(2/n) such deviations. The noise is three of these errors, as dozens of figures are
looked at in one run, and a check that often fails without a reason is ignored. More rounds make it smaller.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "compare"
BENCHMARKS = ("kernels", "selection_time", "memory_vs_gps", "training", "scaling", "deltas")
ALLOWED = 0.05
STANDARD_ERRORS = 3
LOUD = 0.25  # noise from which on the report says so

Unit = Literal["ms", "bytes"]
Figures = dict[str, tuple[float, Unit]]

# What a child runs: that its package is the commit's own is checked there, and not only meant.
CHILD = """
import pathlib, runpy, sys
tree, name = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2]
import fps_kernels, benchmarks
for package in (fps_kernels, benchmarks):
    where = pathlib.Path(package.__file__).resolve()
    assert where.is_relative_to(tree), f"{package.__name__} is imported from {where}, not from {tree}"
assert fps_kernels.backend_for("score_topk", "cpu") == "native", "the native library was not built"
sys.argv = [f"benchmarks.{name}", "--quick"]
runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
"""


class MeasuringError(Exception):
    """A commit could not be checked out, built or measured."""


# ------------------------------------------------------------------------------------------------ figures and verdicts


@dataclass(frozen=True)
class Verdict:
    """One figure of both commits. ``ratio`` is head / base, ``noise`` what such a ratio shows without any change."""

    figure: str
    unit: Unit
    base: float
    head: float
    ratio: float
    noise: float
    worse: bool


def figures(benchmark: str, rows: list[dict[str, Any]]) -> Figures:
    """The times and bytes in the rows of a benchmark's result file, by a name that is the same in every run.

    Args:
        benchmark: its name, which the names begin with.
        rows: as in the ``rows`` of its file.

    Returns:
        ``{name: (figure, unit)}``. A name is made of what the row says in words, such as a model and a method.

    Example:
        >>> figures("training", [{"model": "ViT-Ti/16", "method": "full", "step_ms": 402.0, "peak_bytes": 313762728}])
        {'training: ViT-Ti/16, full, step_ms': (402.0, 'ms'), 'training: ViT-Ti/16, full, peak_bytes': (313762728, 'bytes')}
    """
    found: Figures = {}
    for row in rows:
        words = [value for key, value in row.items() if isinstance(value, str) and key != "target"]
        for key, value in row.items():
            unit = _unit(key, row)
            if unit is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            plain = f"{benchmark}: {', '.join([*words, key])}"
            name, count = plain, 1
            while name in found:  # rows that differ in numbers only come in the same order in every run
                count += 1
                name = f"{plain} #{count}"
            found[name] = value, unit
    return found


def _unit(key: str, row: dict[str, Any]) -> Unit | None:
    words = key.split("_")
    if key == "value":  # of the scaling benchmark, which says in words what it is
        units: dict[str, Unit] = {"time": "ms", "memory": "bytes"}
        return units.get(row.get("quantity", ""))
    if "ms" in words and "against" not in words:  # what an op is held against is torch's
        return "ms"
    return "bytes" if "bytes" in words or key in ("real", "simulated") else None


def noise(rounds: list[list[float]]) -> float:
    """How far a median ratio strays without any change, by the rounds of each commit against themselves.

    Args:
        rounds: the same time in every round, one list per commit, each of at least two rounds.

    Returns:
        The stray as a share: 0.08 means that a ratio of 1.08 says nothing.
    """
    apart = [abs(math.log(a / b)) for times in rounds for a, b in combinations(times, 2)]
    deviation = statistics.median(apart) / 0.954
    error = 1.2533 * math.sqrt(2 / min(len(times) for times in rounds))
    return math.expm1(STANDARD_ERRORS * error * deviation)


def judge(name: str, unit: Unit, base: list[float], head: list[float]) -> Verdict:
    """Compares one figure of both commits, measured in the same rounds."""
    if unit == "bytes":
        before, now = statistics.median(base), statistics.median(head)
        ratio = now / before if before else 1.0 if now == before else math.inf
        return Verdict(name, unit, before, now, ratio, 0.0, min(head) > max(base))
    ratio = statistics.median(b / a for a, b in zip(base, head, strict=True))
    stray = noise([base, head])
    return Verdict(name, unit, statistics.median(base), statistics.median(head), ratio, stray, ratio > 1 + ALLOWED + stray)


def compare(base: list[Figures], head: list[Figures]) -> tuple[list[Verdict], list[str], list[str]]:
    """Verdicts on the figures that both have in every round, then the names that only base, and only head, has."""
    first, second = (set.intersection(*(set(figures) for figures in rounds)) for rounds in (base, head))
    verdicts = [
        judge(name, unit, [figures[name][0] for figures in base], [figures[name][0] for figures in head])
        for name, (_, unit) in base[0].items()
        if name in first and name in second
    ]
    return verdicts, sorted(first - second), sorted(second - first)


def report(verdicts: list[Verdict], only_base: list[str], only_head: list[str]) -> str:
    """The table, what is not compared, and the outcome in one line."""
    head = ("figure", "base", "head", "head / base", "noise", "")
    body = [
        (
            verdict.figure,
            *((f"{x:.4g} ms" if verdict.unit == "ms" else f"{x:,.10g} B") for x in (verdict.base, verdict.head)),
            f"{verdict.ratio:.3f}×",
            f"±{min(verdict.noise, 9.99):.1%}" if verdict.unit == "ms" else "exact",
            ("SLOWER" if verdict.unit == "ms" else "MORE BYTES") if verdict.worse else "",
        )
        for verdict in verdicts
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (head, *body)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    for commit, names in (("base", only_base), ("head", only_head)):
        lines += [f"only in {commit}, not compared: {name}" for name in names]
    loud = sum(verdict.noise > LOUD for verdict in verdicts)
    if loud:
        lines.append(f"times with over {LOUD:.0%} noise, which say little without more rounds or a quieter machine: {loud}")
    worse = sum(verdict.worse for verdict in verdicts)
    allowed = f"{ALLOWED:.0%} and the noise"
    lines.append(f"\n{worse} of {len(verdicts)} figures are worse, beyond {allowed} for times and by any byte for memory.")
    return "\n".join(lines)


def exit_code(verdicts: list[Verdict]) -> int:
    """1 where something got worse, 2 where nothing could be compared."""
    return 2 if not verdicts else int(any(verdict.worse for verdict in verdicts))


# ------------------------------------------------------------------------------------------------ commits


def run(*command: str | Path, folder: Path = ROOT, log: Path | None = None, **environment: str) -> str:
    """What a command prints; its output goes to ``log`` as well.

    Raises:
        MeasuringError: it failed; with the end of its output.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if log:
        log.write_text(done.stdout)
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise MeasuringError(f"{' '.join(map(str, command[:4]))} … failed in {folder} ({done.returncode}):\n{end}")
    return done.stdout.strip()


def working_tree() -> str:
    """A commit of the tracked files as they are: ``HEAD`` where nothing is changed. No branch and no index notices."""
    identity = ("-c", "user.name=compare", "-c", "user.email=compare@localhost")
    return run("git", *identity, "stash", "create") or run("git", "rev-parse", "HEAD")


def check_out(commit: str, tree: Path) -> None:
    """A work tree of the commit with its own native library in its own package."""
    if tree.exists():  # what is ignored stays, so that only changed sources are compiled again
        run("git", "checkout", "--quiet", "--force", "--detach", commit, folder=tree)
        run("git", "clean", "-d", "--force", "--quiet", folder=tree)
    else:
        run("git", "worktree", "add", "--quiet", "--force", "--detach", tree, commit)
    cmake = (sys.executable, "-m", "cmake")
    build = tree / "build" / "native"
    run(*cmake, "-S", tree / "csrc", "-B", build, "-DCMAKE_BUILD_TYPE=Release", folder=tree, FPS_REQUIRE_NATIVE="1")
    run(*cmake, "--build", build, "--parallel", str(os.cpu_count() or 1), folder=tree)
    run(*cmake, "--install", build, "--prefix", tree, folder=tree)


def has(tree: Path, benchmark: str) -> bool:
    """Whether the commit in the tree has that benchmark, as a file or as a folder."""
    path = tree / "benchmarks" / benchmark
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def measure(tree: Path, benchmark: str, log: Path) -> Figures:
    """The figures of one quick run of the commit in a tree.

    An editable install puts a finder before every path. Without ``site`` there is none, and the tree comes first.
    """
    packages = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    path = os.pathsep.join((str(tree), *dict.fromkeys(packages)))
    name = f"{benchmark}_quick.json"
    for old in (tree / "benchmarks").rglob(name):  # the one in the repository was measured elsewhere
        old.unlink()
    command = (sys.executable, "-S", "-c", CHILD, tree, benchmark)
    run(*command, folder=tree, log=log, PYTHONPATH=path, FPS_REQUIRE_NATIVE="1")
    results = next((tree / "benchmarks").rglob(name), None)
    if results is None:
        raise MeasuringError(f"python -m benchmarks.{benchmark} --quick has written no {name} in {tree / 'benchmarks'}")
    return figures(benchmark, json.loads(results.read_text())["rows"])


def turns(rounds: int) -> Iterator[tuple[int, str]]:
    """Who runs when: base and head in every round, in an order that turns around."""
    for i in range(rounds):
        for side in ("base", "head") if i % 2 == 0 else ("head", "base"):
            yield i, side


def measure_both(trees: dict[str, Path], benchmarks: list[str], rounds: int) -> dict[str, list[Figures]]:
    """``{side: figures of every round}``. Benchmarks that give bytes only run once: they are exact."""
    measured: dict[str, list[Figures]] = {side: [{} for _ in range(rounds)] for side in trees}
    for benchmark in benchmarks:
        exact: dict[str, Figures] = {}
        for i, side in turns(rounds):
            if side in exact:
                measured[side][i] |= exact[side]
            elif has(trees[side], benchmark):
                print(f"{benchmark}, round {i + 1} of {rounds}, {side}", file=sys.stderr, flush=True)
                found = measure(trees[side], benchmark, FOLDER / f"{side}-{benchmark}-{i + 1}.log")
                if all(unit == "bytes" for _, unit in found.values()):
                    exact[side] = found
                measured[side][i] |= found
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with, by any name that git knows")
    parser.add_argument(
        "--benchmarks", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS, help="by default all of them"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least 3; more make the noise smaller")
    parser.add_argument("--output", type=Path, help="write verdicts and every round's figures to this JSON file")
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        parser.error("--rounds must be at least 3: the noise is measured between rounds")
    try:
        commits = {"base": run("git", "rev-parse", "--verify", f"{options.base}^{{commit}}"), "head": working_tree()}
        FOLDER.mkdir(parents=True, exist_ok=True)
        trees = {side: FOLDER / side for side in commits}
        for side, commit in commits.items():
            print(f"{side}: {run('git', 'log', '-1', '--format=%h %s', commit)}", flush=True)
            check_out(commit, trees[side])
        measured = measure_both(trees, options.benchmarks, options.rounds)
    except MeasuringError as error:
        print(error, file=sys.stderr)
        return 2
    verdicts, only_base, only_head = compare(measured["base"], measured["head"])
    print(report(verdicts, only_base, only_head))
    if options.output:
        content = {"commits": commits, "verdicts": [asdict(verdict) for verdict in verdicts], "rounds": measured}
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main())
