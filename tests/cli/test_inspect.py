"""The command line around files, plans and the self-test."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fps_kernels as fps
from fps_kernels.cli.plan import parse_bytes
from tests.cli.running import cli, output
from tests.support.models import Classifier, images, labelled
from tests.support.training import train


@pytest.fixture
def files(tmp_path):
    """Two selections, a delta, and the base it belongs to."""
    model = Classifier()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    batch = images()
    selections = [fps.select(model, [batch], scorer=s, budget=fps.PerNeuron(2)) for s in (fps.FPS(), fps.Random(1))]
    for name, selection in zip(("first", "second"), selections, strict=True):
        selection.save(tmp_path / f"{name}.safetensors")
    tuner = fps.attach(model, selections[0])
    train(model, fps.MaskedAdamW(tuner, lr=1e-2), [labelled()])
    fps.save_delta(tuner, tmp_path / "delta.safetensors")
    return tmp_path, selections, model


def test_inspect(files):
    folder, selections, _ = files
    text = output("inspect", folder / "first.safetensors")
    assert "hidden.weight" in text
    assert "scorer: FPS()" in text
    found = json.loads(output("inspect", folder / "delta.safetensors", "--json"))
    assert (found["kind"], found["fps_kernels"]) == ("delta", fps.__version__)
    assert {row["name"]: row["chosen"] for row in found["weights"]} == {n: w.nnz for n, w in selections[0].items()}
    assert "bytes an entry" in output("inspect", folder / "delta.safetensors")


def test_buffers_are_shown(tmp_path):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).eval()
    save_file(model.state_dict(), tmp_path / "base")
    tuner = fps.attach(model, fps.select(model, [torch.randn(4, 3)], budget=fps.PerNeuron(1), include="1.weight"))
    model.train()(torch.randn(4, 3))
    names = ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    fps.save_delta(tuner, tmp_path / "held", buffers=True)
    with pytest.warns(UserWarning, match="3 buffers"):
        fps.save_delta(tuner, tmp_path / "left")
    for file, key in (("held", "buffers"), ("left", "buffers_left_out")):
        assert json.loads(output("inspect", tmp_path / file, "--json"))[key] == names
        assert f"{key}: 3 ({', '.join(names)})" in output("inspect", tmp_path / file)
        output("inspect", tmp_path / file, "--html", tmp_path / "r.html")
        assert f"3 ({', '.join(names)})" in (tmp_path / "r.html").read_text()
    done = cli("apply", tmp_path / "left", tmp_path / "base", tmp_path / "tuned")
    assert done.message.startswith("warning: training changed 3 buffers (0.running_mean")
    assert "3 buffers" in output("apply", tmp_path / "held", tmp_path / "base", tmp_path / "tuned")
    assert torch.equal(load_file(tmp_path / "tuned")["0.running_mean"], model[0].running_mean)


def test_compare(files):
    folder, selections, _ = files
    found = json.loads(output("compare", folder / "first.safetensors", folder / "second.safetensors", "--json"))
    assert found["overlap"] == selections[0].overlap(selections[1])
    assert f"overlap: {found['overlap']:.2%}" in output(
        "compare", *(folder / f"{n}.safetensors" for n in ("first", "second"))
    )
    assert "overlap: 100.00%" in output("compare", folder / "first.safetensors", folder / "delta.safetensors")


def test_apply(files):
    folder, _, model = files
    arguments = (folder / "delta.safetensors", folder / "base.safetensors", folder / "tuned.safetensors")
    done = json.loads(output("apply", *arguments, "--json"))
    assert done["new"] == []
    state = model.state_dict()
    for name, tensor in load_file(folder / "tuned.safetensors").items():
        assert torch.equal(tensor, state[name]), name
    save_file({"other": torch.ones(2)}, folder / "other.safetensors")
    refused = cli("apply", *(folder / f"{n}.safetensors" for n in ("delta", "other", "none")))
    assert refused.code == 2
    assert refused.message.startswith("error: the selection is of another model: this one has no parameter")
    assert not (folder / "none.safetensors").exists()
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_apply_to_a_base_with_another_head_or_precision(files):
    """A checkpoint has the head of its own task, or none, and may be float16."""
    folder, _, model = files
    base = {name: t.half() for name, t in load_file(folder / "base.safetensors").items()}
    del base["head.bias"]
    base["head.weight"] = torch.zeros(1000, 12, dtype=torch.float16)
    save_file(base, folder / "half.safetensors", {"made by": "someone"})
    arguments = (folder / "delta.safetensors", folder / "half.safetensors", folder / "tuned.safetensors")
    done = cli("apply", *arguments)
    assert done.code == 0, done.err
    assert done.err.splitlines() == [
        "values are rounded to float16, which the base has: --dtype fp32 keeps them as they were tuned",
        "head.weight: [1000, 12] in the base is replaced by [5, 12]",
    ]
    tuned, state = load_file(folder / "tuned.safetensors"), model.state_dict()
    assert {t.dtype for t in tuned.values()} == {torch.float16}
    assert all(torch.equal(tuned[name], state[name].half()) for name in ("head.weight", "head.bias"))
    output("apply", *arguments, "--dtype", "fp32")
    tuned = load_file(folder / "tuned.safetensors")
    assert {t.dtype for t in tuned.values()} == {torch.float32}
    chosen = fps.load_delta(folder / "delta.safetensors").selection["hidden.weight"].mask()
    assert torch.equal(tuned["hidden.weight"][chosen], state["hidden.weight"][chosen])


def test_errors_are_one_line(files):
    folder, *_ = files
    (folder / "broken.safetensors").write_bytes(b"nonsense")
    good, broken, missing = (folder / f"{name}.safetensors" for name in ("delta", "broken", "missing"))
    for arguments, message in (
        (("inspect", broken), "is no safetensors file"),
        (("inspect", missing), "there is no file or folder"),
        (("inspect", good, "--run", folder), "--against and --run go with --html"),
        (("inspect", good, "--html", folder), "is a folder, not a file to write"),
        (("inspect", good, "--html", folder / "nowhere" / "r.html"), "there is no folder"),
        (("inspect", good, "--html", folder / "r.html", "--run", folder), "it has no metrics.jsonl"),
        (("compare", good, broken), "is no safetensors file"),
        (("apply", good, broken, folder / "out.safetensors"), "header"),
        (("apply", folder / "first.safetensors", good, folder / "out.safetensors"), "holds no delta"),
        (("apply", good, missing, folder / "out.safetensors"), "there is no file or folder"),
        (("plan", "vit_nothing"), "timm has no model 'vit_nothing'"),
        (("plan", "test_vit", "--gpu-memory", "much"), "'much' is no amount of memory"),
        (("plan", "test_vit", "--dtype", "fp8"), "--dtype must be one of"),
        (("plan", "test_vit", "--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("plan",), "Missing argument 'MODEL'. (fps-kernels plan --help)"),
        (("plan", "test_vit", "--bacth-size", "2"), "No such option: --bacth-size"),
        (("plant",), "No such command 'plant'"),
    ):
        done = cli(*arguments)
        assert done.code == 2, arguments
        assert message in done.message, (arguments, done.message)
        assert done.message.startswith("error: ")
        assert done.out == ""


def test_names_are_no_markup(tmp_path):
    """A weight's name may look like rich's markup, or be wider than a table."""
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    names = ["[red]a[/red].weight", "[/]", "b" * 200]
    fps.Selection.from_masks(dict.fromkeys(names, mask)).save(tmp_path / "s.safetensors")
    text = output("inspect", tmp_path / "s.safetensors")
    assert all(name in text for name in names)
    assert names[0] in output("compare", tmp_path / "s.safetensors", tmp_path / "s.safetensors")


def test_plan():
    arguments = ("plan", "test_vit", "--batch-size", 4, "--method", "forward", "--method", "attach")
    costs = json.loads(output(*arguments, "--json"))
    expected = fps.memory.plan("test_vit", 4, methods=("forward", "attach"))
    assert [cost["peak"] for cost in costs] == [cost.peak for cost in expected.costs]
    text = output("plan", "test_vit", "--method", "forward", "--gpu-memory", "64MiB")
    assert "largest batch in 64.0 MiB" in text


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("40", 40), ("2g", 2 * 10**9)],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


def test_doctor():
    found = json.loads(output("doctor", "--json"))
    assert found["self-test"]["cpu"] == "passed"
    assert set(found["backends"]["cpu"].values()) == {fps.backend_for("score_topk", "cpu")}
    assert "self-test: cpu passed" in output("doctor")
