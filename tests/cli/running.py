"""Runs the command line: in this process, or in one of its own that can be killed."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import fps_kernels.cli


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Of an error, which is one line."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        assert "Traceback" not in self.err
        return self.err.strip()


def cli(*arguments: object) -> Done:
    """``fps-kernels ARGUMENTS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fps-kernels", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            fps_kernels.cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())


def output(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    done = cli(*arguments)
    assert done.code == 0, done.err
    return done.out


# ------------------------------------------------------------------------------------------------ processes

# One process imports everything and starts no thread; each run is forked from it and is ready at once.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.cli.preloaded"])


def _child(arguments: list[str], prepare: Callable[..., None] | None, given: tuple[object, ...], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare(*given)
    multiprocessing.set_start_method("fork", force=True)  # of its own children: as outside of these tests
    sys.argv = ["fps-kernels", *arguments]
    fps_kernels.cli.main()


@dataclass
class Running:
    """A command in a process of its own."""

    process: multiprocessing.process.BaseProcess
    log: Path

    def wait(self) -> int:
        """Its exit code; the negative number of the signal that killed it."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode

    def signal_when(self, happened: Callable[[], bool], number: signal.Signals) -> None:
        """Send a signal as soon as something has happened."""
        deadline = time.monotonic() + 120
        while not happened():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start(
    log: Path, *arguments: object, prepare: Callable[..., None] | None = None, given: tuple[object, ...] = ()
) -> Running:
    """``fps-kernels ARGUMENTS`` in a process of its own, after ``prepare(*given)`` there."""
    process = _server.Process(target=_child, args=([*map(str, arguments)], prepare, given, str(log)))
    process.start()
    return Running(process, log)
