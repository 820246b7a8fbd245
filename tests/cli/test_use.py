"""``fps-kernels evaluate``, ``predict``, ``export`` and ``apply``: a tuned model in use."""

import csv
import json
import os
import stat

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fps_kernels as fps
from fps_kernels.runs.evaluation import Evaluation
from tests.cli.conftest import write_images
from tests.cli.running import cli, output
from tests.cli.test_tune import FAST, copied


@pytest.fixture(scope="module")
def tuned(task, checkpoint, tmp_path_factory):
    """A delta for images of another size than the base's."""
    path = tmp_path_factory.mktemp("tuned") / "task.safetensors"
    small = ["test_vit", "--checkpoint", checkpoint, "--data", task, "--image-size", 32, "--workers", 0, "--batch-size", 4]
    found = json.loads(output("tune", *small, *FAST, "--output", path, "--json"))
    return path, found


@pytest.fixture
def base(checkpoint):
    return ["--checkpoint", checkpoint]


def images_of(task, size=32):
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit")) | {"input_size": (3, size, size)}
    from torchvision.datasets import ImageFolder

    return torch.stack([x for x, _ in ImageFolder(str(task / "test"), timm.data.create_transform(**config))])


def logits_of(tuned, checkpoint, task):
    model = timm.create_model(
        "test_vit",
        num_classes=2,
        img_size=32,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(checkpoint), "source": "file"},
    )
    fps.load_delta(tuned).apply_(model, check_base=False)
    with torch.no_grad():
        return model.eval()(images_of(task))


def test_evaluate_gives_what_tune_measured(tuned, base, task, tmp_path):
    path, found = tuned
    arguments = [path, *base, "--data", task, "--workers", 0]
    evaluated = json.loads(output("evaluate", *arguments, "--output", tmp_path / "e.json", "--json"))
    assert evaluated["accuracy"] == found["accuracy"] == 1.0
    assert evaluated["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert (evaluated["images"], evaluated["top5"]) == (7, None)
    assert evaluated["confusion"] == [[0, 0, 4], [1, 1, 3]]
    assert [row["recall"] for row in evaluated["per_class"]] == [1.0, 1.0]
    assert Evaluation.load(tmp_path / "e.json").accuracy == 1.0
    text = output("evaluate", *arguments)
    assert "accuracy: 100.00% of 7 images" in text


def test_evaluate_tells_mistakes(tuned, base, task, tmp_path):
    data = tmp_path / "images"
    write_images(data / "dark", 3, 190, torch.Generator().manual_seed(0))  # which they are not
    write_images(data / "light", 2, 190, torch.Generator().manual_seed(1))
    html = tmp_path / "r.html"
    done = cli("evaluate", tuned[0], *base, "--data", data, "--workers", 0, "--html", html)
    assert done.code == 0, done.err
    assert "dark taken for light: 3 times" in done.out
    assert "accuracy: 40.00% of 5 images" in done.out
    page = html.read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert '"confusion"' in page
    assert "dark</b> taken for <b>light" in page
    assert "<dd>40.00%</dd>" in page


def test_images_of_other_classes_are_refused(tuned, base, task, tmp_path):
    write_images(tmp_path / "images" / "grey", 1, 120, torch.Generator().manual_seed(0))
    done = cli("evaluate", tuned[0], *base, "--data", tmp_path / "images", "--workers", 0)
    assert "has the class 'grey', which the model lacks: it knows dark, light" in done.message


def test_a_base_of_other_weights_is_refused(tuned, checkpoint, task, tmp_path):
    state = load_file(checkpoint)
    state["blocks.0.attn.qkv.weight"] += 1
    save_file(state, tmp_path / "other.safetensors")
    done = cli("evaluate", tuned[0], "--checkpoint", tmp_path / "other.safetensors", "--data", task)
    assert "was tuned on other weights of test_vit than those of" in done.message
    done = cli("evaluate", tuned[0], "--data", task)
    assert "--checkpoint FILE or --pretrained gives its base" in done.message


def test_predict(tuned, base, checkpoint, task, tmp_path):
    expected = logits_of(tuned[0], checkpoint, task).softmax(1)
    output("predict", tuned[0], task / "test", *base, "--workers", 0, "--output", tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert list(rows[0]) == ["file", "class", "probability", "dark", "light"]
    assert [row["class"] for row in rows] == ["dark"] * 4 + ["light"] * 3
    assert rows[0]["file"] == str(task / "test" / "dark" / "0.png")
    np.testing.assert_allclose([[float(r["dark"]), float(r["light"])] for r in rows], expected, rtol=1e-4, atol=1e-6)
    (tmp_path / "list.csv").write_text(f"path\n{task}/test/light/0.png\n")
    output("predict", tuned[0], tmp_path / "list.csv", *base, "--top", 1, "--workers", 0, "--output", tmp_path / "q.csv")
    (row,) = csv.DictReader((tmp_path / "q.csv").open())
    assert list(row) == ["file", "class_1", "probability_1"]
    assert row["class_1"] == "light"
    one = task / "test" / "light" / "0.png"
    output("predict", tuned[0], one, *base, "--top", 1, "--workers", 0, "--output", tmp_path / "one.csv")
    assert list(csv.DictReader((tmp_path / "one.csv").open())) == [{**row, "file": str(one)}]
    done = cli("predict", tuned[0], tmp_path / "nowhere", *base, "--output", tmp_path / "r.csv")
    assert (done.code, (tmp_path / "r.csv").exists()) == (2, False)
    assert "there is no file or folder" in done.message


def test_exported_for_timm(tuned, base, checkpoint, task, tmp_path):
    output("export", tuned[0], tmp_path / "model", *base)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images_of(task)), logits_of(tuned[0], checkpoint, task))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["label_names"] == ["dark", "light"]
    output("export", tuned[0], tmp_path / "model", *base)  # again
    done = cli("export", tuned[0], tmp_path, *base)
    assert "is there already and is no exported model" in done.message


def test_exported_for_torch(tuned, base, checkpoint, task, tmp_path):
    output("export", tuned[0], tmp_path / "model.pt2", *base, "--to", "torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images_of(task)), logits_of(tuned[0], checkpoint, task))
    about = json.loads((tmp_path / "model.json").read_text())
    done = cli("export", tuned[0], tmp_path / "model.pt", *base, "--to", "torch")
    assert "--to torch writes a file that ends with .pt2" in done.message
    assert (about["classes"], about["input_size"]) == (["dark", "light"], [3, 32, 32])


def test_exported_to_onnx(tuned, base, checkpoint, task, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output("export", tuned[0], tmp_path / "model.onnx", *base, "--to", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images_of(task).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits_of(tuned[0], checkpoint, task), rtol=1e-4, atol=1e-4)


def test_what_apply_writes_loads_into_timm(tuned, checkpoint, task, tmp_path):
    """At the size of the images it was tuned on: position embeddings are resized."""
    old = os.umask(0o022)
    try:
        done = cli("apply", tuned[0], checkpoint, tmp_path / "tuned.safetensors")
    finally:
        os.umask(old)
    assert done.code == 0, done.err
    assert "pos_embed: [1, " in done.err
    written = tmp_path / "tuned.safetensors"
    assert stat.S_IMODE(written.stat().st_mode) == 0o644
    model = timm.create_model("test_vit", num_classes=2, img_size=32, checkpoint_path=str(written)).eval()
    with torch.no_grad():
        assert torch.equal(model(images_of(task)), logits_of(tuned[0], checkpoint, task))
    with safe_open(written, framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["dark", "light"]


def test_apply_says_that_it_rounds(tuned, checkpoint, tmp_path):
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(checkpoint).items()}, tmp_path / "b.safetensors")
    done = cli("apply", tuned[0], tmp_path / "b.safetensors", tmp_path / "t.safetensors")
    assert "values are rounded to bfloat16, which the base has: --dtype fp32 keeps them" in done.err
    assert load_file(tmp_path / "t.safetensors")["blocks.0.mlp.fc1.weight"].dtype == torch.bfloat16
    done = cli("apply", tuned[0], tmp_path / "b.safetensors", tmp_path / "t.safetensors", "--dtype", "fp32")
    assert "rounded" not in done.err


def test_a_checkpoint_of_torch_as_the_base(tuned, checkpoint, task, tmp_path):
    torch.save({"model": {f"module.{n}": t for n, t in load_file(checkpoint).items()}}, tmp_path / "base.pth")
    found = json.loads(
        output("evaluate", tuned[0], "--checkpoint", tmp_path / "base.pth", "--data", task, "--workers", 0, "--json")
    )
    assert found["accuracy"] == 1.0
    written = []
    for name in (checkpoint, tmp_path / "base.pth"):
        output("apply", tuned[0], name, tmp_path / "tuned.safetensors")
        written.append(load_file(tmp_path / "tuned.safetensors"))
    assert "blocks.0.mlp.fc1.weight" in written[0]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(t, written[1][name]) for name, t in written[0].items())


def test_deltas_of_others_are_refused(task, base, tmp_path):
    model = torch.nn.Linear(3, 2)
    with fps.attach(model, fps.select(model, [torch.randn(2, 3)], progress=False)) as tuner:
        fps.save_delta(tuner, tmp_path / "d.safetensors")
    done = cli("evaluate", tmp_path / "d.safetensors", *base, "--data", task)
    assert "does not say its model, image size and classes, as the deltas of fps-kernels tune do" in done.message


def test_more_classes_than_five(checkpoint, tmp_path):
    for split in ("train", "test"):
        for i in range(7):
            write_images(tmp_path / "data" / split / f"class{i}", 2, 40 + 25 * i, torch.Generator().manual_seed(i))
    arguments = ["--checkpoint", checkpoint, "--data", tmp_path / "data", "--image-size", 32, "--workers", 0]
    found = json.loads(
        output("tune", "test_vit", *arguments, "--epochs", 2, "--output", tmp_path / "t.safetensors", "--json")
    )
    assert 0 <= found["accuracy"] <= found["top5"] <= 1
    evaluated = Evaluation.load(tmp_path / "t.run" / "evaluation.json")
    assert sum(n for *_, n in evaluated.confusion) == 14
    assert len(evaluated.worst) == 14 - round(14 * evaluated.accuracy)
    losses = [mistake.loss for mistake in evaluated.worst]
    assert losses == sorted(losses, reverse=True)
    html = tmp_path / "r.html"
    output("inspect", tmp_path / "t.safetensors", "--run", tmp_path / "t.run", "--html", html)
    assert "among the first five" in html.read_text()
    copied(tmp_path / "data", tmp_path / "again")
