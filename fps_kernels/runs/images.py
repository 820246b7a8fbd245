"""Images from folders and from timm's named data sets, in an order that is a function of the seed and of the position."""

import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from fps_kernels.runs.folders import FolderOfClasses, UnreadableImageError, in_mode

_HELD_OUT = ("test", "val", "validation")


@dataclass(frozen=True)
class ImageSet:
    """One split.

    Attributes:
        name: what to call it.
        dataset: a folder's, timm's or torchvision's.
        classes: their names, in the order of the labels.
    """

    name: str
    dataset: Any
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int, mode: str = "RGB") -> tuple[Image.Image, int]:
        """An image and its label.

        Raises:
            UnreadableImageError: it is no image, damaged, or has no label.
        """
        if isinstance(self.dataset, FolderOfClasses):
            return self.dataset.read(index, mode), self.dataset.labels[index]
        try:
            image, target = self.dataset[index]
            image = in_mode(image, mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self._place(index)} cannot be read: {error}") from error
        if not isinstance(target, int) or not 0 <= target < max(len(self.classes), 1):
            raise UnreadableImageError(f"{self._place(index)} has the label {target!r}, not one of {len(self.classes)}")
        return image, target

    def _place(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def digest(self) -> str:
        """Changes with the names, the number and the labels of the images."""
        found = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        if isinstance(self.dataset, FolderOfClasses):
            for path, target in zip(self.dataset.files, self.dataset.labels, strict=True):
                found.update(f"{os.path.relpath(path, self.dataset.root)} {target}\n".encode(errors="surrogateescape"))
        return found.hexdigest()


def open_split(data: str, split: str, root: Path | None = None, download: bool = False) -> ImageSet:
    """A split of a named data set, or a folder of images with a folder per class below it.

    Raises:
        ValueError: there is no such thing, or it holds no image.
        ImportError: it needs a package that is not installed.
    """
    folder = Path(data)
    if folder.is_dir():
        if root is not None:
            raise ValueError(f"--data-root {root} says where a named data set lies, and {data} is a folder: leave it out")
        place = folder / split if split else folder
        if not place.is_dir():
            raise ValueError(f"{data} has no folder {split}")
        images = FolderOfClasses.of(place)
        return ImageSet(str(place), images, images.classes)
    kind, _, rest = data.partition("/")
    if kind.lower() not in ("torch", "hfds") or not rest:
        raise ValueError(f"there is no folder {data}; data sets of timm are named torch/cifar10 or hfds/NAME")
    try:
        with redirect_stdout(sys.stderr):  # which is for results
            dataset = create_dataset(data, root=None if root is None else str(root), split=split, download=download)
    except ImportError as error:
        raise ImportError(f"{data} needs {error.name}: pip install {error.name}", name=error.name) from error
    except (AssertionError, RuntimeError, OSError, TypeError, ValueError) as error:
        hint = "" if root is not None or kind.lower() == "hfds" else "; --data-root says where it lies"
        raise ValueError(f"{data}, split {split}, cannot be opened: {' '.join(str(error).split())}{hint}") from error
    known = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or getattr(dataset, "classes", ())
    if not known:
        raise ValueError(f"{data} does not say which classes it has")
    return ImageSet(f"{data}, {split}", dataset, tuple(map(str, known)))


def training_images(data: str, split: str | None, root: Path | None, download: bool) -> ImageSet:
    """The training split; of a folder without a folder ``train``, all images, which need no classes.

    Raises:
        ValueError: see :func:`open_split`.
    """
    if split is None and root is None and Path(data).is_dir() and not (Path(data) / "train").is_dir():
        images = FolderOfClasses.unlabelled(Path(data))
        return ImageSet(data, images, images.classes)
    return open_split(data, split or "train", root, download)


def training_and_test_images(
    data: str, train_split: str | None, test_split: str | None, root: Path | None, download: bool
) -> tuple[ImageSet, ImageSet]:
    """Both splits, with the same labels.

    Raises:
        ValueError: one of them is missing, there are fewer than two classes, or the test images have others.
    """
    folder = Path(data)
    if folder.is_dir():
        held_out = test_split or next((name for name in _HELD_OUT if (folder / name).is_dir()), None)
        if held_out is None or not (folder / (train_split or "train")).is_dir():
            raise ValueError(f"{data} must hold the folders train and test (or val), each with one folder per class")
        test_split = held_out
    train = open_split(data, train_split or "train", root, download)
    test = open_split(data, test_split or "test", root, download)
    if len(train.classes) < 2:
        raise ValueError(f"{train.name} has one class only: each class needs a folder of its own")
    if train.classes != test.classes:
        if others := sorted(set(test.classes) - set(train.classes)):
            raise ValueError(f"{test.name} has the class {others[0]!r}, which {train.name} lacks")
        if not isinstance(test.dataset, FolderOfClasses):
            raise ValueError(f"the classes of {train.name} and {test.name} differ")
        labels = {name: i for i, name in enumerate(train.classes)}
        test = ImageSet(test.name, test.dataset.with_labels(labels), train.classes)
    return train, test


def as_seen_by(config: dict[str, Any], augment: str = "none", crop_scale: float = 0.5) -> Callable[[Image.Image], Tensor]:
    """From an image to what the model takes, ``[C, H, W]`` float32.

    Args:
        config: ``timm.data.resolve_model_data_config(model)``.
        augment: ``none``, ``flip`` (left and right, at random) or ``crop`` (a random part of it, and flip).
        crop_scale: smallest share of the image's area that a random crop shows.
    """
    shown: dict[str, Any] = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    if augment == "crop":
        made = create_transform(**shown, is_training=True, scale=(crop_scale, 1.0), hflip=0.5, color_jitter=None)
    else:
        made = create_transform(**shown, is_training=False, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    if augment == "flip":
        made = transforms.Compose([transforms.RandomHorizontalFlip(), made])
    transform: Callable[[Image.Image], Tensor] = made
    return transform


@dataclass(frozen=True)
class Order:
    """Which images make up which step: a function of the seed, so that a run can go on from any step.

    Attributes:
        images: how many there are.
        batch_size: images in one forward pass.
        accumulate: forward passes in a step.
        epochs: times that each image is seen.
        seed: of the order.
    """

    images: int
    batch_size: int
    accumulate: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch has the images that are left."""
        return -(-self.images // (self.batch_size * self.accumulate))

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * self.steps_per_epoch

    def sizes(self, step: int) -> list[int]:
        """Images in each forward pass of a step."""
        whole = self.batch_size * self.accumulate
        images = min(whole, self.images - step % self.steps_per_epoch * whole)
        return [min(self.batch_size, images - at) for at in range(0, images, self.batch_size)]

    def batches_from(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of a step and of every step after it, as pairs of epoch and image."""
        first, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size * self.accumulate
        for epoch in range(first, self.epochs):
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(mixed(self.seed, epoch)))
            for indices in order[start:].split(self.batch_size):
                yield [(epoch, i) for i in indices.tolist()]
            start = 0


class _Drawn(Dataset[tuple[Tensor, int]]):
    """Images by epoch and number. What is random about them depends on these and on the seed, not on who reads them."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor], seed: int, mode: str) -> None:
        self.images, self.transform, self.seed, self.mode = images, transform, seed, mode

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        image, target = self.images.read(index, self.mode)
        with _seeded(mixed(self.seed, epoch, index)):
            return self.transform(image), target


def mixed(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside, the process's own afterwards."""
    before = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note it for GPUs, with a stack trace each time
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])


class _Listed(Sampler[list[tuple[int, int]]]):
    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


def _leave_signals(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def default_workers() -> int:
    """One process for each core but one, at most eight."""
    return min(8, len(os.sched_getaffinity(0)) - 1)


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        workers: processes beside this one.
        mode: PIL's mode: RGB, or L for models of one channel.
        pinned: in memory that a GPU copies from.
    """

    workers: int
    mode: str
    pinned: bool

    def batches(
        self,
        images: ImageSet,
        transform: Callable[[Image.Image], Tensor],
        batches: Callable[[], Iterator[list[tuple[int, int]]]],
        seed: int,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches ``([B, C, H, W] float32, [B] int64)``.

        Raises:
            UnreadableImageError: an image that cannot be read.
        """
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            _Drawn(images, transform, seed, self.mode),
            batch_sampler=_Listed(batches),
            num_workers=self.workers,
            pin_memory=self.pinned,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # the loader draws a number when it starts: not one of the model's
        )
        try:
            yield from loader
        except UnreadableImageError as error:  # from a worker its message is a traceback with the message at the end
            raise UnreadableImageError(str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ")[-1]) from error


def in_order(count: int, batch_size: int) -> Callable[[], Iterator[list[tuple[int, int]]]]:
    """Batches of all images, one after the other."""
    return lambda: ([(0, i) for i in range(at, min(at + batch_size, count))] for at in range(0, count, batch_size))


def sample(count: int, most: int, batch_size: int, seed: int) -> tuple[int, Callable[[], Iterator[list[tuple[int, int]]]]]:
    """The number of batches of ``most`` images drawn without repetition, and what makes them."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, -1)))[:most].sort().values
    parts = [[(0, i) for i in part.tolist()] for part in drawn.split(batch_size)]
    return len(parts), lambda: iter(parts)
