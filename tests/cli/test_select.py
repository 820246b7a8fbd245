"""``fps-kernels select``: the library's own choice, from a folder of images, within every budget and by every scorer."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torchvision.datasets import ImageFolder

import fps_kernels as fps
from fps_kernels.runs.models import timm_model
from tests.cli.running import cli, output


def selected(small: list[object], folder: Path, *more: object) -> fps.Selection:
    path = folder / "selection.safetensors"
    output("select", *small, *more, "--output", path)
    return fps.Selection.load(path)


def same(a: fps.Selection, b: fps.Selection) -> bool:
    return set(a) == set(b) and a.dense == b.dense and all(torch.equal(a[n].mask(), b[n].mask()) for n in a)


@pytest.fixture(scope="module")
def by_hand(task, checkpoint):
    """The model, and its images as timm would have them."""
    model = timm_model("test_vit", checkpoint, 2, 32)
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config, is_training=False)
    images = [image for image, _ in ImageFolder(str(task / "train"), transform)]
    return model, [torch.stack(images[i : i + 4]) for i in range(0, len(images), 4)]


@pytest.mark.parametrize(
    ("arguments", "scorer", "budget"),
    [
        ((), fps.FPS(), fps.PerNeuron(1)),
        (("--k", 3, "--micro-batch", 2), fps.FPS(), fps.PerNeuron(3)),
        (("--scorer", "wanda", "--density", 0.02), fps.Wanda(), fps.PerTensor(0.02)),
        (("--scorer", "magnitude", "--density", 0.02, "--global"), fps.Magnitude(), fps.Global(0.02)),
        (("--scorer", "random", "--seed", 5), fps.Random(5), fps.PerNeuron(1)),
    ],
)
def test_is_the_choice_of_the_library(small, by_hand, tmp_path, arguments, scorer, budget):
    model, batches = by_hand
    expected = fps.select(model, batches, scorer=scorer, budget=budget, micro_batch=4, progress=False)
    found = selected(small, tmp_path, *arguments)
    assert found.nnz == expected.nnz
    assert found.overlap(expected) > 0.999  # micro-batches may turn a tie within rounding
    if "--micro-batch" not in arguments:
        assert same(found, expected)
    assert found.description["scorer"] == repr(scorer)
    assert found.description["model"] == "test_vit"


def test_growth_over_an_anchor(small, by_hand, task, tmp_path):
    model, batches = by_hand
    anchor = fps.calibrate(model, batches[:2], progress=False)
    anchor.save(tmp_path / "anchor.safetensors")
    expected = fps.select(model, batches, scorer=fps.GrowthDriven(anchor), progress=False)
    assert same(selected(small, tmp_path, "--scorer", "growth", "--anchor", tmp_path / "anchor.safetensors"), expected)
    of_a_folder = selected(small, tmp_path, "--scorer", "growth", "--anchor", task / "train" / "dark")
    assert 0.2 < of_a_folder.overlap(expected) < 1  # a folder of images without classes


def test_globs_and_precision(small, tmp_path):
    found = selected(small, tmp_path, "--include", "blocks.*.weight", "--exclude", "*.fc2.weight", "--dense", "head.*")
    assert found.dense == ("head.weight", "head.bias")
    assert all(n.startswith("blocks.") and "fc2" not in n for n in found)
    bf16 = selected(small, tmp_path, "--dtype", "bf16")
    assert 0.8 < bf16.overlap(selected(small, tmp_path)) < 1


def test_a_sample_of_the_images(small, tmp_path):
    found = [selected(small, tmp_path, "--samples", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert found[0].description["images"] == "3"
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_prints_what_was_chosen_and_what_it_cost(small, tmp_path):
    path = tmp_path / "s.safetensors"
    done = cli("select", *small, "--k", 2, "--output", path)
    assert done.code == 0
    selection = fps.Selection.load(path)
    assert f"chosen: {selection.nnz:,} entries" in done.out
    assert "peak memory: " in done.out
    assert re.search(r"blocks\.\*\.attn\.qkv +6 +192×64 +2,304 +3\.12% ", done.out)  # six layers in one row
    assert "\x1b" not in done.out + done.err  # neither colours nor a bar where there is no terminal
    found = json.loads(output("select", *small, "--k", 2, "--output", path, "--json"))
    assert found["entries"] == selection.nnz == sum(row["chosen"] for row in found["weights"])
    weights = sum(p.numel() for p in timm.create_model("test_vit", num_classes=2).parameters()) * 4
    assert 0.8 * weights < found["peak_memory"] < 4 * weights


def test_a_folder_without_splits_will_do(checkpoint, task, tmp_path):
    small = ["test_vit", "--checkpoint", checkpoint, "--data", task / "test", "--image-size", 32, "--workers", 0]
    assert selected(small, tmp_path).description["images"] == "7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", 2, "--density", 0.1], "give --k or --density, not both"),
        (["--global"], "--global goes with --density"),
        (["--density", 0], "density"),
        (["--density", 1.5], "density"),
        (["--k", 0], "Invalid value for '--k'"),
        (["--k", 100000], "columns of the widest weight: choose a smaller k"),
        (["--scorer", "growth"], "--scorer growth and --anchor go together"),
        (["--anchor", "somewhere"], "--scorer growth and --anchor go together"),
        (["--scorer", "growth", "--anchor", "nowhere"], "there is no folder or file nowhere"),
        (["--scorer", "best"], "Invalid value for '--scorer'"),
        (["--include", "nothing*"], "include pattern 'nothing*' matches none"),
        (["--exclude", "nothing*"], "exclude pattern 'nothing*' matches none"),
        (["--dense", "nothing*"], "dense pattern 'nothing*' matches none"),
        (["--micro-batch", 0], "Invalid value for '--micro-batch'"),
        (["--samples", 0], "Invalid value for '--samples'"),
        (["--batch-size", "x"], "Invalid value for '--batch-size'"),
        (["--dtype", "fp8"], "Invalid value for '--dtype'"),
        (["--image-size", 33], "test_vit cannot take images of 33×33 (--image-size)"),
        (["--image-size", 8], "cannot be loaded into test_vit"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--data", "torch/nothing"], "torch/nothing, split train, cannot be opened"),
        (["--data", "torch/cifar10"], "--data-root says where it lies"),
        (["--train-split", "training"], "has no folder training"),
        (["--checkpoint", "nowhere.safetensors"], "there is no file or folder nowhere.safetensors"),
        (["--pretrained"], "give --checkpoint or --pretrained, not both"),
        (["--output", "/nowhere/s.safetensors"], "there is no folder /nowhere"),
        (["--output", "/"], "is a folder, not a file to write"),
    ],
)
def test_what_is_refused(small, tmp_path, arguments, message):
    done = cli("select", *small, "--output", tmp_path / "s.safetensors", *arguments)
    assert done.code == 2
    assert message in done.message, done.message
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(small, tmp_path):
    done = cli("select", *small, "--output", tmp_path / "s.safetensors", "--device", "cuda")
    assert (done.code, done.message) == (2, "error: --device cuda: torch finds no GPU here")
