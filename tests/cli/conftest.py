"""A task and a network, as small as they can be."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import to_pil_image


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of tests/cli/running.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(folder: Path, count: int, brightness: int, generator: torch.Generator) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        noise = torch.randint(-40, 40, (3, 20, 24), generator=generator) + brightness
        to_pil_image(noise.to(torch.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """Two classes that differ in brightness: 7 + 6 images to tune on, 4 + 3 to test on."""
    folder, generator = tmp_path_factory.mktemp("data") / "task", torch.Generator().manual_seed(0)
    for split, counts in (("train", (7, 6)), ("test", (4, 3))):
        for label, brightness, count in zip(("dark", "light"), (60, 190), counts, strict=True):
            write_images(folder / split / label, count, brightness, generator)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Weights of test_vit without a head."""
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file({name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in state.items()}, path)
    return path


@pytest.fixture
def small(task, checkpoint) -> list[object]:
    """The arguments that select and tune have in common."""
    return ["test_vit", "--checkpoint", checkpoint, "--data", task, "--image-size", 32, "--workers", 0, "--batch-size", 4]
