"""Paths that are written to, checked before the work rather than after it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        ValueError: it is a folder, or its folder is missing or cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file to write")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written to")


@contextmanager
def replaced_at_once(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, whose file takes the place of ``path`` when the block ends without an error."""
    path = Path(os.path.realpath(path))  # a link stays a link
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
