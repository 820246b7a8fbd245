"""A look at every image before any work, so that a damaged one does not stop it in the middle."""

from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from fps_kernels.runs.folders import ImageFiles, UnreadableImageError, read_image
from fps_kernels.runs.images import ImageSet, leave_signals
from fps_kernels.runs.progress import progress_bar

_SHOWN = 5
_AT_ONCE = 64


class _Looks(Dataset[list[str]]):
    """What is wrong with some files: a message for each."""

    def __init__(self, parts: list[list[str]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> list[str]:
        return [message for path in self.parts[place] if (message := _problem(path))]


def _problem(path: str) -> str:
    try:
        read_image(Path(path), "RGB")
    except UnreadableImageError as error:
        return str(error)
    return ""


def check_images(sets: Iterable[ImageSet | None], workers: int) -> int:
    """Decode every image file once.

    Args:
        sets: images to look at; what is no file (a named data set) is not.
        workers: processes beside this one.

    Returns:
        How many were looked at.

    Raises:
        UnreadableImageError: some cannot be read; the message says why of the first, and names others.
    """
    files = {
        str(path): None for s in sets if s is not None and isinstance(s.dataset, ImageFiles) for path in s.dataset.files
    }
    every = list(files)
    parts = [every[at : at + _AT_ONCE] for at in range(0, len(every), _AT_ONCE)]
    problems: list[str] = []
    loader = DataLoader(
        _Looks(parts), batch_size=None, num_workers=workers if len(parts) > 1 else 0, worker_init_fn=leave_signals
    )
    with progress_bar() as progress:
        task = progress.add_task("look at images", total=len(every), status="")
        for part, found in zip(parts, loader, strict=True):
            problems += found
            progress.advance(task, len(part))
    if problems:
        named = [text.partition(" cannot be read")[0] for text in problems[1:_SHOWN]]
        more = len(problems) - 1 - len(named)
        others = f" (and {', '.join(named)}{f' and {more} more' if more else ''})" if named else ""
        raise UnreadableImageError(problems[0] + others)
    return len(every)
