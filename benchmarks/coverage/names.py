"""Names of the models that are tried."""

from pathlib import Path

_FILE = Path(__file__).with_suffix(".txt")


def names(library: str) -> list[str]:
    """The names under a heading of the file."""
    _, _, rest = _FILE.read_text().partition(f"[{library}]\n")
    return rest.partition("[")[0].split()
