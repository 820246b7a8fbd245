"""What a check gives, row by row, so that what was measured before it ends is not lost."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.shared.device_timing import Bench

Row = dict[str, Any]
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own.

    Attributes:
        run: gives the rows of its table, each as soon as it is measured; a row with ``failed`` says that something is wrong.
        seconds: after which it is stopped, and loses only what it has not given yet.
    """

    run: Callable[[Bench, bool], Iterator[Row]]
    seconds: float


def attempt(labels: Row, measure: Callable[[], Row]) -> Row:
    """A row of these labels and what was measured, or of why it could not be, so that the next row can.

    Raises:
        Exception: where the device is lost to this process, and nothing more can be measured.
    """
    try:
        return {**labels, **measure()}
    except Exception as error:
        if "CUDA error" in str(error) or "HIP error" in str(error):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {**labels, "failed": f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"}
