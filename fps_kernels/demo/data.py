"""What the demo tunes on: scikit-learn's digits, which are always at hand, or a folder of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

OLD_DIGITS, NEW_DIGITS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]`` float32 or uint8, and their classes ``[N]`` int64."""

    images: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Task:
    """A classification task held in memory.

    Attributes:
        name: what to call it.
        classes: number of classes.
        train: what to tune on.
        test: what to measure on.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batches(self, split: Split, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches, shuffled if a generator is given."""
        order = torch.arange(len(split)) if generator is None else torch.randperm(len(split), generator=generator)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        for indices in order.split(size):
            images = split.images[indices]
            scaled = images.float() / 255 if images.dtype == torch.uint8 else images
            yield (scaled - mean) / std, split.target[indices]


def digits(classes: tuple[int, ...], train_per_class: int, seed: int = 0) -> Task:
    """Some classes of scikit-learn's 8×8 digits.

    Args:
        classes: which digits.
        train_per_class: training images of each class; the others are for testing.
        seed: of the split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in classes:
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        train.append(members[:train_per_class])
        test.append(members[train_per_class:])
    position = torch.full((10,), -1)
    position[list(classes)] = torch.arange(len(classes))
    parts = [Split(images[i], position[labels[i]]) for i in (torch.cat(train), torch.cat(test))]
    return Task(f"digits {classes[0]}–{classes[-1]}", len(classes), parts[0], parts[1], (0.3,), (0.38,))


def image_folder(
    directory: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...], test_limit: int | None = None
) -> Task:
    """``directory/train/<class>/*`` and ``directory/test/<class>/*``, resized and kept in memory as bytes.

    Args:
        directory: holds ``train`` and ``test`` (or ``val``).
        size: images become ``size`` × ``size``.
        mean: per channel.
        std: per channel.
        test_limit: measure on so many test images, drawn with a fixed seed.

    Raises:
        ValueError: folders that are missing, or splits with different classes.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    held_out = next((directory / name for name in ("test", "val") if (directory / name).is_dir()), None)
    if not (directory / "train").is_dir() or held_out is None:
        raise ValueError(f"{directory} must hold the folders train and test (or val), each with one folder per class")
    transform = v2.Compose([v2.PILToTensor(), v2.Resize((size, size), antialias=True)])
    folders = [ImageFolder(str(path), transform=transform) for path in (directory / "train", held_out)]
    if folders[0].classes != folders[1].classes:
        raise ValueError(f"{directory}: the classes of train and {held_out.name} differ")
    splits = []
    for folder, limit in zip(folders, (None, test_limit), strict=True):
        indices = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
        pairs = [folder[i] for i in sorted(indices)]
        splits.append(Split(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])))
    return Task(directory.name, len(folders[0].classes), splits[0], splits[1], mean, std)
