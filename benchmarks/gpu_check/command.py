"""One command for whoever has a GPU: ``python -m benchmarks.gpu_check [--minutes 8] [--output FOLDER]``.

Each check runs in a process of its own, the most valuable first, within the minutes it is given. ``gpu_check.json`` and
``gpu_check.md`` are written anew after every row that is measured, so that a run that is killed leaves what it had. A check
that crashes, loses the device or takes too long loses nothing but what it had not measured yet, and the report says so; what
did not fit is listed as not run. The exit code is 1 where a check did not pass. Without a GPU ``--device cpu --quick`` runs
every path that a CPU can, at sizes that say nothing about speed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu_check import report as reports
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.worker import HARDWARE

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 15  # of what is left: less than a process takes until it measures anything
_LOOK = 0.2  # seconds between looks at a check's rows
_SHOWN = 40  # lines of a check's output that the report shows where it did not pass


class Runner:
    """Runs checks one after another and keeps the reports up to date.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        quick: small sizes and few rounds.
        names: of the checks.
        minutes: for all of them.
        folder: of the reports, which is there.
    """

    def __init__(self, device: str, quick: bool, names: list[str], minutes: float, folder: Path) -> None:
        self._device, self._quick, self._folder = device, quick, folder
        self._end = time.monotonic() + 60 * minutes
        command = f"python -m benchmarks.gpu_check --device {device} --minutes {minutes:g}" + (" --quick" if quick else "")
        checks = {n: {"status": reports.NOT_RUN, "why": "", "seconds": 0.0, "error": "", "rows": []} for n in names}
        self.report: reports.Report = {"command": command, "hardware": {}, "checks": checks}

    def run(self) -> bool:
        """All checks; whether those that ran have passed."""
        self._write()
        for name, check in self.report["checks"].items():
            left = self._end - time.monotonic()
            if left < LEAST_SECONDS:
                check["why"] = "no time was left"
                continue
            self._one(name, check, min(CHECKS[name].seconds, left))
            print(f"{name}: {check['status']} in {check['seconds']:.1f} s", flush=True)
            if check["error"]:
                print(check["error"], file=sys.stderr, flush=True)
        self._write()
        return all(check["status"] in (reports.PASSED, reports.NOT_RUN) for check in self.report["checks"].values())

    def _one(self, name: str, check: dict[str, Any], seconds: float) -> None:
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        rows, log = self._folder / "checks" / f"{slug}.jsonl", self._folder / "checks" / f"{slug}.log"
        rows.parent.mkdir(exist_ok=True)
        rows.unlink(missing_ok=True)
        check["status"] = reports.RUNNING
        self._write()
        start = time.monotonic()
        with log.open("w") as output:
            process = self._started(name, rows, output)
            try:
                while process.poll() is None and time.monotonic() - start < seconds:
                    time.sleep(_LOOK)
                    self._read(rows, check)
                stopped = process.poll() is None
            finally:
                _stop(process)
        check["seconds"] = time.monotonic() - start
        self._read(rows, check)
        code = process.returncode
        if stopped:
            check["status"], check["why"] = "stopped", f"it took longer than {seconds:.0f} s"
        elif code < 0:
            check["status"], check["why"] = "crashed", f"killed by {signal.Signals(-code).name}"
        else:
            check["status"] = reports.PASSED if code == 0 else "failed"
        if stopped or code:
            check["error"] = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_SHOWN:])
        self._write()

    def _started(self, name: str, rows: Path, output: TextIO) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "benchmarks.gpu_check.worker", name, self._device, str(rows.resolve())]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [*command, *(["--quick"] if self._quick else [])],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,  # which ends with this process, however it does
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def _read(self, path: Path, check: dict[str, Any]) -> None:
        """Take over the rows that are there by now, and write the reports if they are more."""
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last is not whole, or empty
        found = [json.loads(line) for line in lines]
        hardware = [line[HARDWARE] for line in found if HARDWARE in line]
        rows = [line for line in found if HARDWARE not in line]
        if len(rows) > len(check["rows"]) or (hardware and not self.report["hardware"]):
            self.report["hardware"] = self.report["hardware"] or hardware[0]
            check["rows"] = rows
            self._write()

    def _write(self) -> None:
        reports.write(self.report, self._folder)


def _stop(process: "subprocess.Popen[str]") -> None:
    """With all that it has started: they are a group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def main() -> None:
    """Run, write both reports, exit with 1 if a check did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all checks together (default: %(default)g)")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS), help="some checks, in this order")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the reports")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --quick runs the same paths without one")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    options.output.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.device, options.quick, options.only, options.minutes, options.output)
    passed = runner.run()
    print(f"written: {options.output / reports.JSON}, {options.output / reports.MARKDOWN}")
    sys.exit(not passed)
