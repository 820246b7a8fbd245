"""What a long command tells on standard error: notes, warnings, a bar."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def speaks() -> bool:
    """Whether this process tells the user anything: of several the first."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """One line on standard error, which leaves standard output to results."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that says what the user may not have meant."""
    note(f"warning: {text}")


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """What the library warns of meanwhile is told as the command's own warnings are, without a place in its code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        warn(str(warning.message))


def progress_bar(*, shown: bool = True) -> Progress:
    """A bar with the time left, on standard error; nothing where that is no terminal.

    Tasks have the field ``status``, a few words behind the bar.

    Args:
        shown: ``False`` where somebody else shows what goes on.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal and speaks()), expand=True
    )
