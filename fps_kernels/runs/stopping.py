"""Stopping in order: a signal is noted, and whoever is at work stops at a place from which it can go on."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class InterruptedRunError(Exception):
    """A run that was asked to stop and did so in order.

    Attributes:
        exit_code: 128 + the number of the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one has its usual effect.

    Attributes:
        given: whether there was one.
        exit_code: 128 + its number.
    """

    def __init__(self) -> None:
        self.given = False
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.given, self.exit_code = True, 128 + number
        signal.signal(number, self._before[number])

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
