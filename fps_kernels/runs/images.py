"""Images and their labels, in an order that is a function of the seed and of the position."""

import hashlib
import os
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from fps_kernels.runs.folders import ImageFiles, UnreadableImageError, in_mode


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
        if isinstance(self.dataset, ImageFiles):
            return self.dataset.read(index, mode), self.dataset.labels[index]
        try:
            image, target = self.dataset[index]
            image = in_mode(image, mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self.place(index)} cannot be read: {error}") from error
        if not isinstance(target, int) or not 0 <= target < max(len(self.classes), 1):
            raise UnreadableImageError(f"{self.place(index)} has the label {target!r}, not one of {len(self.classes)}")
        return image, target

    def place(self, index: int) -> str:
        """What to call an image: its path, where it has one."""
        if isinstance(self.dataset, ImageFiles):
            return str(self.dataset.files[index])
        return f"image {index} of {self.name}"

    def labels(self) -> list[int] | None:
        """Of all images, without reading them; ``None`` where the data set does not tell."""
        if isinstance(self.dataset, ImageFiles):
            return list(self.dataset.labels)
        if isinstance(self.dataset, Subset):
            known = ImageSet(self.name, self.dataset.dataset, self.classes).labels()
            return None if known is None else [known[i] for i in self.dataset.indices]
        samples = getattr(getattr(self.dataset, "reader", None), "samples", None)
        targets = getattr(self.dataset, "targets", None)
        if targets is None and samples is not None:
            targets = [target for _, target in samples]
        return None if targets is None else [int(target) for target in targets]

    def part(self, name: str, places: Sequence[int]) -> "ImageSet":
        """Some of the images, of the same classes."""
        held = self.dataset
        return ImageSet(name, held.part(places) if isinstance(held, ImageFiles) else Subset(held, places), self.classes)

    def digest(self) -> str:
        """Changes with the names, the number and the labels of the images."""
        found = hashlib.sha256(f"{len(self)} {self.classes}".encode())
        if isinstance(self.dataset, ImageFiles):
            for path, target in zip(self.dataset.files, self.dataset.labels, strict=True):
                found.update(f"{os.path.relpath(path, self.dataset.root)} {target}\n".encode(errors="surrogateescape"))
        elif isinstance(self.dataset, Subset):
            found.update(repr(list(self.dataset.indices)).encode())
        return found.hexdigest()


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
        with seeded(mixed(self.seed, epoch, index)):
            return self.transform(image), target


def mixed(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside, the process's own afterwards."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note it for GPUs, with a stack trace each time
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's policies draw from it
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


class _Listed(Sampler[list[tuple[int, int]]]):
    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


def leave_signals(_: int) -> None:
    """In a process that reads images."""
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
            worker_init_fn=leave_signals,
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
