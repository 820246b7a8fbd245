"""Made-up images, and one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of three classes that differ in brightness."""
    directory = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for dataset in ("one", "two"):
        for split, count in (("train", 6), ("test", 3)):
            for label in range(3):
                path = directory / dataset / split / str(label)
                path.mkdir(parents=True)
                for i in range(count):
                    pixels = torch.rand(3, 32, 32, generator=generator) * 100 + 70 * label
                    to_pil_image(pixels.to(torch.uint8)).save(path / f"{i}.png")
    return directory


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The script sets the threads of its process; and on so little work two threads wait for each other only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
