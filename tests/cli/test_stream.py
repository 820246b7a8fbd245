"""``--stream``: weights stay in the checkpoint while a model is chosen from and tuned."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import fps_kernels as fps
from tests.cli.running import cli, output


@pytest.fixture
def streaming(task, checkpoint) -> list[object]:
    return ["test_vit", "--checkpoint", checkpoint, "--stream", "--data", task, "--workers", 0, "--batch-size", 7]


def test_select(streaming, task, checkpoint, tmp_path):
    output("select", *streaming, "--k", 2, "--output", tmp_path / "streamed.safetensors")
    options = ["--exclude", "patch_embed.*", "--dense", "head.*"]
    plain = [a for a in streaming if a != "--stream"]
    output("select", *plain, *options, "--k", 2, "--output", tmp_path / "plain.safetensors")
    streamed, expected = (fps.Selection.load(tmp_path / f"{name}.safetensors") for name in ("streamed", "plain"))
    assert streamed.dense == expected.dense
    assert list(streamed) == list(expected)
    assert all(torch.equal(streamed[name].columns, w.columns) for name, w in expected.items())


def test_tune(streaming, checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    arguments = ["tune", *streaming, "--k", 2, "--epochs", 2, "--lr", 0.01, "--output", tmp_path / "task.safetensors"]
    found = json.loads(output(*arguments, "--json"))
    assert found["steps"] == 4
    assert checkpoint.read_bytes() == before
    delta = fps.load_delta(tmp_path / "task.safetensors")
    assert delta.added
    assert all(v.abs().sum() > 0 for v in delta.values.values())
    again = json.loads(output(*arguments, "--json"))  # it is at its end
    assert again["accuracy"] == found["accuracy"]

    # The same numbers as the checkpoint with what was added to it.
    output("apply", tmp_path / "task.safetensors", checkpoint, tmp_path / "tuned.safetensors")
    tuned, base = load_file(tmp_path / "tuned.safetensors"), load_file(checkpoint)
    for name, w in delta.selection.items():
        changed = tuned[name] - base[name]
        assert torch.equal(changed[~w.mask()], torch.zeros_like(changed)[~w.mask()])
        torch.testing.assert_close(changed[w.mask()], delta.values[name], rtol=0, atol=1e-6)
    model = timm.create_model("test_vit", num_classes=2)
    model.load_state_dict(tuned)


def test_what_it_needs(task, tmp_path):
    done = cli("select", "test_vit", "--stream", "--data", task, "--output", tmp_path / "s.safetensors")
    assert (done.code, "--stream needs --checkpoint" in done.message) == (2, True)


def test_a_plan_says_when():
    said = output("plan", "test_vit", "--gpu-memory", "64KiB", "--method", "forward")
    assert "with --stream, select and tune leave them in their files" in said


def test_evaluate_what_was_streamed(streaming, checkpoint, task, tmp_path):
    """Its values are added to those of the checkpoint."""
    arguments = ["--k", 2, "--epochs", 2, "--lr", 0.01, "--output", tmp_path / "task.safetensors", "--json"]
    found = json.loads(output("tune", *streaming, *arguments))
    command = ["evaluate", tmp_path / "task.safetensors", "--checkpoint", checkpoint, "--data", task, "--workers", 0]
    evaluated = json.loads(output(*command, "--json"))
    assert evaluated["accuracy"] == found["accuracy"]
    assert evaluated["loss"] == pytest.approx(found["loss"], rel=1e-4)
