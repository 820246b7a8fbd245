"""The demo on its embedded data and on a folder of images, and the command line around it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import to_pil_image

from fps_kernels.demo.compare import accuracy, tune
from fps_kernels.demo.data import NEW_DIGITS, OLD_DIGITS, digits, image_folder
from fps_kernels.demo.digits import DIGITS_CHECKPOINT, digits_vit
from fps_kernels.demo.run import Settings, run
from fps_kernels.runs.models import timm_model

SHORT = Settings(epochs=2, seeds=1, batch_size=50)


def fps_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fps_kernels.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes that differ in brightness, 40×30 pixels."""
    for split, count in (("train", 8), ("test", 4)):
        for label, brightness in (("dark", 60), ("light", 190)):
            directory = tmp_path / "task" / split / label
            directory.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-30, 30, (3, 30, 40)) + brightness
                to_pil_image(noise.to(torch.uint8)).save(directory / f"{i}.png")
    return tmp_path / "task"


def test_the_shipped_checkpoint():
    assert DIGITS_CHECKPOINT.stat().st_size < 1_000_000
    model = digits_vit(5)
    task = digits(OLD_DIGITS, train_per_class=20)
    head_only = tune(model, task, "head", lr=1e-2, epochs=20, batch_size=20, seed=0)
    assert head_only.accuracy > 0.9  # its features tell the digits apart that it was pretrained on
    assert accuracy(digits_vit(5, pretrained=False), task) < 0.6


def test_digits_split():
    task = digits(NEW_DIGITS, train_per_class=20)
    assert len(task.train) == 100
    assert len(task.train) + len(task.test) == sum(
        torch.tensor(__import__("sklearn.datasets").datasets.load_digits().target) > 4
    )
    assert set(task.train.target.tolist()) == set(range(5))
    assert torch.equal(task.train.images, digits(NEW_DIGITS, train_per_class=20).train.images)


def test_prints_what_was_chosen_what_it_cost_and_what_it_gave():
    console = Console(record=True, width=100)
    outcomes = run(SHORT, console)
    text = console.export_text()
    for part in ("blocks.3.mlp.fc2", "FPS, micro", "GPS, whole", "peak", "nothing (new head)", "FPS, kept in 8 bits"):
        assert part in text
    assert set(outcomes) == {"FPS", "GPS", "random", "head only", "head and biases", "full tuning"}
    assert outcomes["FPS"][0].trained == outcomes["GPS"][0].trained == outcomes["random"][0].trained
    assert outcomes["full tuning"][0].trained == sum(p.numel() for p in digits_vit(5).parameters())
    assert all(0 <= outcome.accuracy <= 1 for members in outcomes.values() for outcome in members)


def test_a_real_model_on_a_folder_of_images(folder, tmp_path):
    checkpoint = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), checkpoint)
    console = Console(record=True, width=100)
    settings = replace(SHORT, model="test_vit", checkpoint=checkpoint, data=folder, image_size=32, lr_head=1e-2, epochs=8)
    outcomes = run(settings, console)
    assert "task: 2 classes, 16 training and 8 test images" in console.export_text().replace("\n", " ")
    assert outcomes["FPS"][0].accuracy > 0.5


def test_image_folders(folder):
    task = image_folder(folder, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), test_limit=3)
    assert (len(task.train), len(task.test), task.classes) == (16, 3, 2)
    assert task.train.images.shape == (16, 3, 16, 16)
    (x, y), *_ = task.batches(task.train, 16)
    assert x[y == 1].mean() > x[y == 0].mean()
    with pytest.raises(ValueError, match="must hold the folders train and test"):
        image_folder(folder / "train", 16, (0.5,), (0.5,))
    (folder / "test" / "third").mkdir()
    (folder / "test" / "third" / "0.png").write_bytes((folder / "test" / "dark" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="the classes of train and test differ"):
        image_folder(folder, 16, (0.5,), (0.5,))


def test_checkpoints_that_are_refused(tmp_path):
    for name, checkpoint, match in (
        ("vit_nothing", None, "timm has no model 'vit_nothing'"),
        ("test_vit", tmp_path / "vit.pth", "there is no file or folder"),
        ("test_vit", tmp_path / "vit.safetensors", "there is no file or folder"),
    ):
        with pytest.raises(ValueError, match=match):
            timm_model(name, checkpoint, 2, None)


def test_command_line(folder):
    shown = fps_kernels("demo", "--help")
    assert shown.returncode == 0
    assert "--checkpoint" in shown.stdout
    failed = fps_kernels("demo", "--data", str(folder))
    assert (failed.returncode, failed.stderr) == (
        2,
        "error: --model and --data go together: one says what to tune, the other on what\n",
    )
    missing = fps_kernels("demo", "--model", "test_vit", "--data", "nowhere")
    assert (missing.returncode, missing.stderr) == (2, "error: there is no folder nowhere\n")
