"""Which images are tuned on, which tell the best epoch, and which are measured on at the end."""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from timm.data import create_dataset

from fps_kernels.runs import lists
from fps_kernels.runs.folders import ImageFiles
from fps_kernels.runs.hints import install_hint
from fps_kernels.runs.images import ImageSet, mixed
from fps_kernels.runs.lists import Columns, Listed, metadata_of, read_list
from fps_kernels.runs.progress import note, warn

_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VALIDATION = ("val", "valid", "validation", "dev", "eval")


@dataclass(frozen=True)
class Source:
    """Where images are.

    Attributes:
        data: a folder, a list of images, or the name of a data set of timm.
        root: where a named data set lies, or what the paths of a list are relative to.
        download: a named data set.
        train: the name of the split to tune on, if it is not a usual one.
        validation: likewise of the images that choose, such as the best epoch.
        test: likewise of the images that are measured on.
        columns: of lists.
    """

    data: str
    root: Path | None = None
    download: bool = False
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: Columns = field(default_factory=Columns)

    @property
    def path(self) -> Path:
        """As a folder or a file."""
        return Path(self.data)

    @property
    def is_list(self) -> bool:
        """Whether it is one file that names its images."""
        return self.path.suffix.lower() in lists.ENDINGS

    @cached_property
    def listed(self) -> Listed:
        """The list, which is read once."""
        return read_list(self.path, self.root, self.columns)


@dataclass(frozen=True)
class Splits:
    """Images by what they are for, all with the same classes.

    Attributes:
        train: to tune on.
        validation: to choose by, ``None`` where there are none.
        test: to measure on, ``None`` where there are none. Nothing is chosen by them.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None

    @property
    def watched(self) -> ImageSet:
        """What is measured after each epoch: the validation images, or the test images where there are no others."""
        found = self.validation if self.validation is not None else self.test
        assert found is not None
        return found


def open_split(source: Source, split: str) -> ImageSet:
    """One split with its labels; of a folder, ``""`` is the folder itself.

    Raises:
        ValueError: there is no such thing, or it holds no image.
        ImportError: it needs a package that is not installed.
    """
    if source.is_list:
        listed = source.listed
        return _of_list(listed, split if listed.splits else None)
    if source.path.is_dir():
        if source.root is not None:
            raise ValueError(
                f"--data-root {source.root} says where a named data set lies, and {source.data} is a folder: leave it out"
            )
        place = source.path / split if split else source.path
        if place.is_dir():
            return _of_folder(place, source.columns)
        for ending in lists.ENDINGS:
            if (found := source.path / f"{split}{ending}").is_file():
                return _of_list(read_list(found, None, source.columns), None)
        raise ValueError(f"{source.data} has no folder {split}")
    return _named(source, split)


def _of_folder(folder: Path, columns: Columns) -> ImageSet:
    """Labels are those of the list beside the images, or the names of the folders."""
    if (metadata := metadata_of(folder)) is not None:
        listed = read_list(metadata, None, columns)
        if listed.has_labels:
            return _of_list(listed, None, str(folder))
        note(f"{metadata} has no column of labels: classes are the folders in {folder}")
    images = ImageFiles.of(folder)
    return ImageSet(str(folder), images, images.classes)


def _of_list(listed: Listed, split: str | None, name: str | None = None) -> ImageSet:
    if not listed.has_labels:
        raise ValueError(
            f"{listed.file} has no column of labels: name it {lists.LABELS[0]} in the first line, or say which with "
            "--label-column"
        )
    images = listed.images(split)
    return ImageSet(name or f"{listed.file}{f', {split}' if split else ''}", images, images.classes)


def _named(source: Source, split: str) -> ImageSet:
    data, root = source.data, source.root
    kind, _, rest = data.partition("/")
    if kind.lower() not in ("torch", "hfds") or not rest:
        raise ValueError(f"there is no folder {data}; data sets of timm are named torch/cifar10 or hfds/NAME")
    try:
        with redirect_stdout(sys.stderr):  # which is for results
            dataset = create_dataset(data, root=None if root is None else str(root), split=split, download=source.download)
    except ImportError as error:
        raise ImportError(install_hint(data, error), name=error.name) from error
    except (AssertionError, RuntimeError, OSError, TypeError, ValueError) as error:
        hint = "" if root is not None or kind.lower() == "hfds" else "; --data-root says where it lies"
        raise ValueError(f"{data}, split {split}, cannot be opened: {' '.join(str(error).split())}{hint}") from error
    known = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or getattr(dataset, "classes", ())
    if not known:
        raise ValueError(f"{data} does not say which classes it has")
    return ImageSet(f"{data}, {split}", dataset, tuple(map(str, known)))


def _has(source: Source, split: str) -> bool:
    if source.is_list:
        return split in source.listed.splits
    return (source.path / split).is_dir() or any((source.path / f"{split}{e}").is_file() for e in lists.ENDINGS)


def _first(source: Source, names: Iterable[str]) -> str | None:
    return next((name for name in names if _has(source, name)), None)


def training_images(source: Source) -> ImageSet:
    """The training split; of a folder without a folder ``train``, all images, which need no classes.

    Raises:
        ValueError: see :func:`open_split`.
    """
    if source.is_list:
        listed = source.listed
        split = source.train or (_first(source, _TRAIN) if listed.splits else None)
        images = listed.images(split)
        return ImageSet(f"{source.data}{f', {split}' if split else ''}", images, images.classes)
    if not source.path.is_dir():
        return open_split(source, source.train or "train")
    split = source.train or _first(source, _TRAIN)
    if split is None and source.root is None:
        images = ImageFiles.unlabelled(source.path)
        return ImageSet(source.data, images, images.classes)
    return open_split(source, split or "train")


def unlabelled_images(source: Source) -> ImageSet:
    """All images of a folder or of a list, or a single one, whatever they are.

    Raises:
        ValueError: there is none.
    """
    if source.is_list:
        listed = source.listed
        return ImageSet(source.data, replace(listed, has_labels=False).images(), ())
    if source.path.is_dir():
        return ImageSet(source.data, ImageFiles.unlabelled(source.path), ())
    if not source.path.is_file():
        raise ValueError(f"there is no file or folder {source.data}")
    return ImageSet(source.data, ImageFiles(source.path.parent, (source.path,), (0,), ("",)), ())


def measured_images(source: Source, split: str | None) -> ImageSet:
    """Images with labels to measure on: a split, the test or validation images if there are some, or all.

    Raises:
        ValueError: see :func:`open_split`.
    """
    if not source.is_list and not source.path.is_dir():
        return open_split(source, split or "test")
    return open_split(source, split or _first(source, (*_TEST, *_VALIDATION)) or "")


def splits_of(source: Source, validation_share: float | None, seed: int) -> Splits:
    """The images of a run.

    Args:
        source: where they are.
        validation_share: share of the training images, of each class alike, that is held out to choose by; in (0, 1).
        seed: of the share.

    Raises:
        ValueError: a split is missing, there are fewer than two classes, others have classes that the training images lack,
            or validation images are there already.
    """
    local = source.is_list or source.path.is_dir()
    names: list[str | None]
    if local:
        train_name = source.train or _first(source, _TRAIN)
        names = [source.validation or _first(source, _VALIDATION), source.test or _first(source, _TEST)]
        if train_name is None and any(names):
            raise ValueError(f"{source.data} must hold the folders train and test (or val): there is no train")
        if train_name is None and source.is_list and source.listed.splits:
            raise ValueError(f"{source.data} has no split train, but {', '.join(source.listed.splits)}: give --train-split")
    else:
        train_name, names = source.train or "train", [source.validation, source.test or "test"]
    if names == [None, None] and validation_share is None:
        raise ValueError(
            f"{source.data} must hold the folders train and test (or val), each with one folder per class; with training "
            "images alone, --val-share 0.2 holds out a share of them"
        )
    train = open_split(source, train_name or "")
    if len(train.classes) < 2:
        raise ValueError(f"{train.name} has one class only: each class needs a folder of its own, or a label of its own")
    validation, test = (None if name is None else _with_labels_of(train, open_split(source, name)) for name in names)
    if validation_share is not None:
        if validation is not None:
            raise ValueError(f"--val-share holds out training images, and {validation.name} is there already: leave it out")
        train, validation = held_out(train, validation_share, seed)
    for other in (validation, test):
        if other is not None and (shared := _shared(train, other)):
            warn(f"{len(shared)} of the images of {other.name} are also tuned on, such as {shared[0]}")
    return Splits(train, validation, test)


def held_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Two parts of a split: what is left, and a share of each class, at least one image of it and at most all but one.

    Raises:
        ValueError: a class with a single image, or a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"--val-share must lie between 0 and 1, got {share}")
    labels = images.labels()
    if labels is None:  # a data set that does not tell: by chance
        labels = [0] * len(images)
    members: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        members.setdefault(label, []).append(place)
    out: set[int] = set()
    for label, places in sorted(members.items()):
        if len(places) < 2:
            raise ValueError(f"the class {images.classes[label]} has one image: --val-share needs two of each class")
        count = min(max(1, round(share * len(places))), len(places) - 1)
        drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(mixed(seed, label, -2)))
        out.update(places[i] for i in drawn[:count].tolist())
    kept = [place for place in range(len(images)) if place not in out]
    return images.part(f"{images.name} without those held out", kept), images.part(f"{images.name}, held out", sorted(out))


def _with_labels_of(train: ImageSet, other: ImageSet) -> ImageSet:
    if train.classes == other.classes:
        return other
    if unknown := sorted(set(other.classes) - set(train.classes)):
        raise ValueError(f"{other.name} has the class {unknown[0]!r}, which {train.name} lacks")
    if not isinstance(other.dataset, ImageFiles):
        raise ValueError(f"the classes of {train.name} and {other.name} differ")
    labels = {name: i for i, name in enumerate(train.classes)}
    return ImageSet(other.name, other.dataset.with_labels(labels), train.classes)


def _shared(train: ImageSet, other: ImageSet) -> list[str]:
    """Files that are in both."""
    if not isinstance(train.dataset, ImageFiles) or not isinstance(other.dataset, ImageFiles):
        return []
    tuned_on = set(train.dataset.files)
    return [str(path) for path in other.dataset.files if path in tuned_on]
