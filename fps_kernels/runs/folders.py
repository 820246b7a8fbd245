"""Image files with labels: folders, a folder per class, as people have them; and each image as it is meant to be seen."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fps_kernels.runs.progress import note

ENDINGS = frozenset((".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Of image files, in lower case."""

_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))  # what systems leave behind, unasked


class UnreadableImageError(ValueError):
    """An image that cannot be read; the message names it."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their labels.

    Attributes:
        root: the folder that names are told from.
        files: of images; those of a folder of classes are sorted within each class.
        labels: of each file, an index into ``classes``.
        classes: their names, sorted: those of the folders directly below ``root``, or those of a list.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def of(cls, root: Path) -> "ImageFiles":
        """Look through a folder. A class is a direct child; its images lie anywhere below.

        What is hidden, what is no image and images beside the classes are left out, which is said in one line.

        Raises:
            ValueError: there is no class, or a class has no image.
        """
        left_out: dict[str, int] = {}
        children = sorted(root.iterdir(), key=lambda path: path.name)
        names = [path.name for path in children if path.is_dir() and not _is_hidden(path.name)]
        for path in children:
            if _is_hidden(path.name):
                _count(left_out, "hidden")
            elif not path.is_dir():
                _count(left_out, "beside the classes")
        files: list[Path] = []
        found: list[int] = []
        for label, name in enumerate(names):
            own = list(_images(root / name, left_out))
            if not own:
                raise ValueError(
                    f"the class {name} has no image: {root / name} holds no file that ends with {', '.join(sorted(ENDINGS))}"
                )
            files += own
            found += [label] * len(own)
        if not files:
            raise ValueError(f"{root} has no class: each class needs a folder of its own there, with its images")
        _say(root, left_out)
        return cls(root, tuple(files), tuple(found), tuple(names))

    @classmethod
    def unlabelled(cls, root: Path) -> "ImageFiles":
        """All images below a folder, as one class.

        Raises:
            ValueError: there is none.
        """
        left_out: dict[str, int] = {}
        files = tuple(_images(root, left_out))
        if not files:
            raise ValueError(f"there is no image in {root}")
        _say(root, left_out)
        return cls(root, files, (0,) * len(files), (root.name,))

    def with_labels(self, numbers: Mapping[str, int]) -> "ImageFiles":
        """With other labels of the same classes, as of another folder that has these and more."""
        return replace(self, labels=tuple(numbers[self.classes[label]] for label in self.labels), classes=tuple(numbers))

    def part(self, places: Sequence[int]) -> "ImageFiles":
        """Some of the images, of the same classes."""
        return replace(self, files=tuple(self.files[i] for i in places), labels=tuple(self.labels[i] for i in places))

    def read(self, index: int, mode: str) -> Image.Image:
        """An image, as :func:`read_image` does."""
        return read_image(self.files[index], mode)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _count(left_out: dict[str, int], reason: str) -> None:
    left_out[reason] = left_out.get(reason, 0) + 1


def _say(root: Path, left_out: dict[str, int]) -> None:
    if left_out:
        what = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        note(f"{root}: left out {sum(left_out.values())} of what is there: {what}")


def _images(folder: Path, left_out: dict[str, int], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Of a folder first, then of the folders in it; links are followed, but not to a folder that is being looked through."""
    here = os.path.realpath(folder)
    if here in above:
        return
    folders = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if _is_hidden(path.name):
            _count(left_out, "hidden")
        elif path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in ENDINGS:
            yield path
        else:
            _count(left_out, "no image")
    for path in folders:
        yield from _images(path, left_out, above | {here})


def read_image(path: Path, mode: str) -> Image.Image:
    """An image, turned as its camera says, in a mode of PIL's; 16 bits of grey become 8.

    Raises:
        UnreadableImageError: it is no image, or damaged; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return in_mode(ImageOps.exif_transpose(image), mode)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{path} cannot be read: it is no image that PIL knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path} cannot be read: {error}") from error


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in a mode of 8 bits; PIL itself would clip 16 bits.

    Raises:
        ValueError: its numbers are floating-point, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its numbers are floating-point, whose range it does not say: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL reads 16 bits as I;16 or, of some formats, as 32-bit integers
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(f"its numbers reach from {numbers.min()} to {numbers.max()}: save it with 8 or 16 bits")
        image = Image.fromarray(np.round(numbers / 257).astype(np.uint8))  # 65535 becomes 255
    return image.convert(mode)
