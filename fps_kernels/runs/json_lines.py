"""Files with one JSON object a line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def objects(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each line, from 1, and the object in it; empty lines are left out.

    Args:
        file: what the lines are of, for messages.
        lines: cut at line feeds alone, since strings may hold whatever else separates lines.

    Raises:
        ValueError: a line that is no JSON object.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}, line {number}, is no JSON object")
        yield number, found
