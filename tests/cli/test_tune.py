"""``fps-kernels tune``: it learns, its delta is the tuned model, and what it is given is checked."""

import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder

import fps_kernels as fps
from fps_kernels.runs.images import Order
from fps_kernels.runs.models import timm_model
from fps_kernels.runs.splits import Source, open_split
from tests.cli.conftest import write_images
from tests.cli.running import cli, output

FAST = ["--epochs", 8, "--lr", 0.01, "--k", 2, "--log-steps", 2, "--eval-epochs", 0]


def records(run: Path, kind: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if r["type"] == kind]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_delta_on_the_checkpoint_is_the_tuned_model(small, task, checkpoint, tmp_path, dtype):
    delta, tuned = tmp_path / "task.safetensors", tmp_path / "tuned.safetensors"
    found = json.loads(output("tune", *small, *FAST, "--dtype", dtype, "--output", delta, "--json"))
    assert found["accuracy"] == 1.0  # dark or light
    output("apply", delta, checkpoint, tuned, "--dtype", dtype)
    model = timm_model("test_vit", tuned, 2, 32).eval()  # with a new head, as for another task
    base, written = load_file(checkpoint), load_file(tuned)
    model.head.load_state_dict({name: written[f"head.{name}"] for name in ("weight", "bias")})
    selection = fps.load_delta(delta).selection
    for name, p in model.named_parameters():
        kept = ~selection[name].mask() if name in selection else torch.tensor(name not in selection.dense)
        if kept.any() and name in base and base[name].shape == p.shape:
            before = base[name].to(torch.bfloat16 if dtype == "bf16" else torch.float32).float()
            assert torch.equal(p[kept.expand_as(p)], before[kept.expand_as(p)]), name
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    images = list(ImageFolder(str(task / "test"), timm.data.create_transform(**config, is_training=False)))
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in images]))
    target = torch.tensor([label for _, label in images])
    assert float((logits.argmax(1) == target).float().mean()) == found["accuracy"]
    loss = float(torch.nn.functional.cross_entropy(logits, target))
    assert loss == pytest.approx(found["loss"], rel=1e-4 if dtype == "fp32" else 0.3)
    assert json.loads(selection.description["classes"]) == ["dark", "light"]


def test_metrics(small, tmp_path):
    arguments = ["--epochs", 4, "--lr", 0.01, "--log-steps", 3, "--eval-epochs", 2, "--output", tmp_path / "t.safetensors"]
    output("tune", *small, *arguments)
    run = tmp_path / "t.run"
    train, evals = records(run, "train"), records(run, "eval")
    assert [r["step"] for r in train] == [3, 4, 6, 8, 9, 12, 15, 16]  # each third step and the end of each epoch
    assert [r["epoch"] for r in evals] == [2, 4]
    assert all(r["step_seconds"] > 0 and r["images_per_second"] > 0 for r in train)
    assert train[0]["lr"] > train[-1]["lr"] > 0
    (start,) = records(run, "start")
    delta = fps.load_delta(tmp_path / "t.safetensors")
    assert start["trained"] == delta.entries
    assert start["peak_memory"] > 4 * sum(p.numel() for p in timm.create_model("test_vit", num_classes=2).parameters())


def test_a_given_selection_is_the_same_as_choosing_it_here(small, tmp_path):
    selection = tmp_path / "s.safetensors"
    output("select", *small, "--k", 2, "--output", selection)
    output("tune", *small, *FAST, "--epochs", 1, "--output", tmp_path / "a.safetensors")
    output("tune", *small, "--epochs", 1, "--lr", 0.01, "--selection", selection, "--output", tmp_path / "b.safetensors")
    a, b = (fps.load_delta(tmp_path / f"{n}.safetensors") for n in "ab")
    assert all(torch.equal(a.values[n], b.values[n]) for n in a.values)
    assert all(torch.equal(a.dense[n], b.dense[n]) for n in a.dense)
    done = cli("tune", *small, "--selection", selection, "--density", 0.1, "--output", tmp_path / "c")
    assert (done.code, done.message) == (2, "error: --selection has its choice made: --density does not go with it")
    masks = {"nothing.weight": torch.ones(2, 2, dtype=torch.bool)}
    fps.Selection.from_masks(masks).save(tmp_path / "other.safetensors")
    done = cli("tune", *small, "--selection", tmp_path / "other.safetensors", "--output", tmp_path / "d.safetensors")
    assert (done.code, "of another model" in done.message) == (2, True)


def test_batch_norm_keeps_its_statistics(task, tmp_path):
    """As in the protocol: norm layers stay as they are."""
    torch.manual_seed(3)
    base = timm.create_model("test_efficientnet", num_classes=2)
    save_file({k: v for k, v in base.state_dict().items() if "classifier" not in k}, tmp_path / "base.safetensors")
    arguments = ["test_efficientnet", "--checkpoint", tmp_path / "base.safetensors", "--data", task, "--workers", 0]
    arguments += ["--image-size", 32, "--epochs", 2, "--seed", 4, "--output", tmp_path / "t.safetensors", "--json"]
    done = cli("tune", *arguments)
    assert done.code == 0, done.err
    assert "buffer" not in done.err
    output("apply", tmp_path / "t.safetensors", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    tuned = timm_model("test_efficientnet", tmp_path / "tuned.safetensors", 2, 32)
    for name, b in base.named_buffers():
        assert torch.equal(b, tuned.get_buffer(name)), name
    assert not torch.equal(base.get_parameter("conv_stem.weight"), tuned.get_parameter("conv_stem.weight"))


@pytest.mark.parametrize("buffers", [True, False])
def test_buffers_that_change_in_a_run_are_in_its_delta(task, tmp_path, monkeypatch, buffers):
    """Such as those of a norm that knows nothing of ``track_running_stats``. Stopped in between, it goes on with them."""
    monkeypatch.setattr("fps_kernels.runs.loop._freeze_running_statistics", lambda model: None)
    base = timm.create_model("test_efficientnet", num_classes=2)
    state = {k: v for k, v in base.state_dict().items() if "classifier" not in k}
    save_file({k: v for k, v in state.items() if not k.startswith("bn2.num")}, tmp_path / "base.safetensors")
    arguments = ["test_efficientnet", "--checkpoint", tmp_path / "base.safetensors", "--data", task, "--workers", 0]
    arguments += ["--image-size", 32, "--epochs", 2, "--seed", 4, "--output", tmp_path / "t.safetensors", "--json"]
    if not buffers:
        done = cli("tune", *arguments, "--no-buffers")
        assert done.err.count("warning: training changed ") == 1
        assert not fps.load_delta(tmp_path / "t.safetensors").buffers
        return
    done = cli("tune", *arguments)
    assert done.code == 0, done.err
    assert "buffer" not in done.err
    first = fps.load_delta(tmp_path / "t.safetensors").buffers
    again = cli("tune", *arguments)  # everything is read from the folder
    second = fps.load_delta(tmp_path / "t.safetensors").buffers
    assert (again.code, first.keys()) == (0, second.keys())
    assert all(torch.equal(b, second[name]) for name, b in first.items())
    output("apply", tmp_path / "t.safetensors", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    written = load_file(tmp_path / "tuned.safetensors")
    assert first.keys() == {name for name, _ in base.named_buffers()}
    assert all(torch.equal(b, written[name]) for name, b in first.items())


def test_tensorboard(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*FAST, "--epochs", 2, "--tensorboard", tmp_path / "board", "--output", tmp_path / "t.safetensors"]
    output("tune", *small, *arguments)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    drawn = {(e.step, round(e.value, 5)) for e in board.Scalars("train/loss")}
    assert drawn == {(r["step"], round(r["loss"], 5)) for r in records(tmp_path / "t.run", "train")}
    assert [e.step for e in board.Scalars("eval/accuracy")] == [8]


def test_options_that_change_the_weights(small, tmp_path):
    """Each reaches the training."""
    deltas, selection = {}, tmp_path / "s.safetensors"
    output("select", *small, "--include", "blocks.0.*", "--output", selection)
    ways = [[], ["--lr-head", 0.1], ["--weight-decay", 5], ["--warmup", 0.9], ["--label-smoothing", 0.5]]
    ways += [
        ["--clip-grad", 0.01],
        ["--autocast", "bf16"],
        ["--accumulate", 2],
        ["--augment", "none"],
        ["--augment", "crop"],
    ]
    for i, more in enumerate([*ways, ["--drop-path", 0.5]]):
        path = tmp_path / f"{i}.safetensors"
        output("tune", *small, "--lr", 0.01, "--epochs", 1, "--selection", selection, *more, "--output", path)
        values = fps.load_delta(path).values
        deltas[tuple(more)] = torch.cat([values[name] for name in sorted(values)])
    names = list(deltas)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(deltas[one], deltas[other]), (one, other)


def test_a_named_data_set(checkpoint, tmp_path):
    """timm's torch/mnist, whose files are made up: grey images of two classes."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 6)):
        labels = bytes(i % 2 for i in range(count))
        pixels = b"".join(bytes([200 if label else 30]) * 784 for label in labels)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    arguments = ["--checkpoint", checkpoint, "--data", "torch/mnist", "--data-root", tmp_path, "--image-size", 32]
    found = json.loads(output("tune", "test_vit", *arguments, *FAST, "--workers", 0, "--output", tmp_path / "t", "--json"))
    assert (found["accuracy"], found["images"]) == (1.0, 6)
    assert fps.load_delta(tmp_path / "t").dense["head.weight"].shape == (10, 64)


def copied(task: Path, folder: Path) -> Path:
    for path in task.rglob("*.png"):
        target = folder / path.relative_to(task)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_named(small, task, tmp_path, workers):
    data = copied(task, tmp_path / "data")
    broken = data / "train" / "dark" / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    done = cli("tune", *small, "--data", data, "--workers", workers, "--output", tmp_path / "t.safetensors")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: {broken} cannot be read: ")
    broken.write_text("no image")
    done = cli("tune", *small, "--data", data, "--workers", workers, "--output", tmp_path / "u.safetensors")
    assert f"error: {broken} cannot be read: it is no image that PIL knows\n" in done.err


def test_classes_must_agree(small, task, tmp_path):
    data = copied(task, tmp_path / "data")
    write_images(data / "train" / "grey", 2, 120, torch.Generator().manual_seed(0))
    train, test = (open_split(Source(str(data)), split) for split in ("train", "test"))
    assert (train.classes, test.classes) == (("dark", "grey", "light"), ("dark", "light"))
    found = json.loads(output("tune", *small, *FAST, "--data", data, "--output", tmp_path / "t.safetensors", "--json"))
    assert found["accuracy"] > 0.5  # light is class 2 in both
    write_images(data / "test" / "blue", 1, 120, torch.Generator().manual_seed(0))
    done = cli("tune", *small, "--data", data, "--output", tmp_path / "u.safetensors")
    assert (done.code, "has the class 'blue', which" in done.message) == (2, True)


def test_random_weights_are_warned_about(task, tmp_path):
    arguments = ["test_vit", "--data", task, "--image-size", 32, "--workers", 0, "--epochs", 1]
    done = cli("tune", *arguments, "--output", tmp_path / "t.safetensors")
    assert done.code == 0
    warning = "warning: test_vit has random weights: --checkpoint FILE or --pretrained gives it others"
    assert done.err.splitlines().count(warning) == 1


def test_checkpoints_of_another_model(small, checkpoint, tmp_path):
    state = load_file(checkpoint)
    del state["blocks.2.mlp.fc1.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    for model, path, message in (
        ("test_vit", tmp_path / "lacking.safetensors", "it lacks blocks.2.mlp.fc1.weight"),
        ("test_vit", tmp_path / "broken.safetensors", "no safetensors file, or damaged"),
        ("test_vit2", checkpoint, "cannot be loaded into test_vit2"),
        ("test_vti", checkpoint, "timm has no model 'test_vti': did you mean 'test_vit'?"),
    ):
        done = cli("tune", model, *small[1:], "--checkpoint", path, "--output", tmp_path / "t.safetensors")
        assert done.code == 2
        assert message in done.message, done.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", 0], "--lr must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--lr-head", -1], "--lr-head must be positive"),
        (["--clip-grad", 0], "--clip-grad must be positive"),
        (["--weight-decay", -1], "--weight-decay must not be negative"),
        (["--epochs", 0], "Invalid value for '--epochs'"),
        (["--accumulate", 0], "Invalid value for '--accumulate'"),
        (["--warmup", 2], "Invalid value for '--warmup'"),
        (["--label-smoothing", 1], "Invalid value for '--label-smoothing'"),
        (["--augment", "cutmix"], "Invalid value for '--augment'"),
        (["--crop-scale", 0], "Invalid value for '--crop-scale'"),
        (["--test-split", "none"], "has no folder none"),
        (["--selection", "nowhere"], "there is no file or folder nowhere"),
        (["--lr", 1e30], "the loss is nan at step"),
        (["--output", "/nowhere/t.safetensors"], "there is no folder /nowhere"),
    ],
)
def test_what_is_refused(small, tmp_path, arguments, message):
    done = cli("tune", *small, "--epochs", 3, "--output", tmp_path / "t.safetensors", *arguments)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "t.safetensors").exists()


def test_a_run_that_diverges_does_not_spoil_what_was_saved(small, tmp_path):
    arguments = ["--lr", 1e30, "--warmup", 1, "--epochs", 20, "--save-steps", 1, "--log-steps", 1000, "--clip-grad", 1e30]
    done = cli("tune", *small, *arguments, "--output", tmp_path / "t.safetensors")
    assert (done.code, "the loss is " in done.err) == (2, True)
    assert all(torch.isfinite(t.float()).all() for t in load_file(tmp_path / "t.run/state/state.safetensors").values())


def test_missing_splits(small, task, tmp_path):
    done = cli("tune", *small, "--data", task / "train", "--output", tmp_path / "t.safetensors")
    assert (done.code, "must hold the folders train and test (or val)" in done.message) == (2, True)
    one = tmp_path / "one"
    for split in ("train", "val"):
        write_images(one / split / "only", 2, 100, torch.Generator().manual_seed(0))
    done = cli("tune", *small, "--data", one, "--output", tmp_path / "t.safetensors")
    assert (done.code, "has one class only" in done.message) == (2, True)


@pytest.mark.parametrize(("images", "batch_size", "accumulate"), [(13, 4, 2), (8, 4, 2), (5, 8, 1), (7, 1, 3)])
def test_the_order_is_the_same_from_any_step(images, batch_size, accumulate):
    order = Order(images, batch_size, accumulate, epochs=3, seed=7)
    every = list(order.batches_from(0))
    for epoch in range(3):
        assert sorted(i for batch in every for e, i in batch if e == epoch) == list(range(images))
    assert every[: len(every) // 3] != [[(0, i) for _, i in batch] for batch in every[len(every) // 3 : 2 * len(every) // 3]]
    done = 0
    for step in range(order.steps):
        assert list(order.batches_from(step)) == every[done:]
        sizes = order.sizes(step)
        assert sizes == [len(batch) for batch in every[done : done + len(sizes)]]
        done += len(sizes)
    assert done == len(every)
