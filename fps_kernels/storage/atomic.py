"""Files that are replaced at once, and paths that are checked before the work rather than after it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
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
def replaced_at_once(path: str | PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written to; it takes that name when the block ends without an error.

    What was written is forced to the disk first: whoever is killed in between leaves the old file, or none. The old file's
    permissions stay.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)  # there is no other way to ask
    os.umask(mask)
    return mask
