"""``fps-kernels tune`` as people train: averages, mixing, class weights, the best epoch, stopping early, 16 bits."""

import json
import random
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fps_kernels as fps
from tests.cli.running import cli, output, start
from tests.cli.test_resume import assert_same_end, assert_same_files, lines
from tests.cli.test_tune import copied, records

# Everything that has a state of its own or draws something.
EVERYTHING = ["--epochs", 4, "--lr", 0.01, "--k", 2, "--log-steps", 1, "--val-share", 0.3, "--keep", "best", "--ema", 0.9]
EVERYTHING += ["--mixup", 0.4, "--cutmix", 1, "--auto-augment", "rand-m9-mstd0.5", "--color-jitter", 0.3, "--erase", 0.5]
EVERYTHING += [
    "--class-weights",
    "balanced",
    "--autocast",
    "fp16",
    "--keep-bits",
    8,
    "--grad-checkpointing",
    "--clip-grad",
    1,
]


def test_killed_with_everything_on(small, tmp_path):
    folders = [tmp_path / "straight", tmp_path / "killed"]
    commands = []
    for folder in folders:
        folder.mkdir()
        commands.append(["tune", *small, *EVERYTHING, "--save-steps", 1, "--output", folder / "task.safetensors"])
    assert start(folders[0] / "log", *commands[0]).wait() == 0, (folders[0] / "log").read_text()
    run, when = folders[1] / "task.run", random.Random(torch.initial_seed()).randint(1, 11)
    running = start(folders[1] / "log", *commands[1])
    running.signal_when(lambda: lines(run) >= when, signal.SIGKILL)
    running.wait()
    assert start(folders[1] / "log", *commands[1]).wait() == 0, (folders[1] / "log").read_text()
    assert_same_end(folders[1], folders[0])
    best = [load_file(folder / "task.run/best/best.safetensors") for folder in folders]
    assert all(torch.equal(t, best[1][name]) for name, t in best[0].items())
    evaluations = [json.loads((folder / "task.run/evaluation.json").read_text()) for folder in folders]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0]["images"] == 7


def test_each_option_reaches_the_training(small, tmp_path):
    deltas, selection = {}, tmp_path / "s.safetensors"
    output("select", *small, "--include", "blocks.0.*", "--output", selection)
    (tmp_path / "weights.json").write_text('{"dark": 1, "light": 3}')
    ways = [[], ["--ema", 0.9], ["--mixup", 1], ["--cutmix", 1], ["--mixup", 1, "--cutmix", 1], ["--color-jitter", 0.4]]
    ways += [["--auto-augment", "augmix-m3-w3"], ["--erase", 1], ["--class-weights", "balanced"], ["--autocast", "fp16"]]
    ways += [["--class-weights", tmp_path / "weights.json"], ["--schedule", "constant"]]
    for i, more in enumerate(ways):
        path = tmp_path / f"{i}.safetensors"
        output("tune", *small, "--lr", 0.01, "--epochs", 1, "--selection", selection, *more, "--output", path)
        values = fps.load_delta(path).values
        deltas[tuple(map(str, more))] = torch.cat([values[name] for name in sorted(values)])
    names = list(deltas)
    for i, one in enumerate(names):
        assert torch.isfinite(deltas[one]).all()
        for other in names[i + 1 :]:
            assert not torch.equal(deltas[one], deltas[other]), (one, other)


def test_kept_bits_reach_the_tuner(small, tmp_path, monkeypatch):
    from fps_kernels.runs import job

    given = []
    real = job.attach
    monkeypatch.setattr(job, "attach", lambda *args, **more: given.append(more["keep_bits"]) or real(*args, **more))
    for i, more in enumerate([[], ["--keep-bits", 8]]):
        output("tune", *small, "--epochs", 1, *more, "--output", tmp_path / f"{i}.safetensors")
    assert given == [None, 8]


def test_blocks_that_are_computed_again_give_the_same(small, tmp_path):
    for name, more in (("a", []), ("b", ["--grad-checkpointing"])):
        output("tune", *small, "--epochs", 1, "--lr", 0.01, *more, "--output", tmp_path / f"{name}.safetensors")
    a, b = (fps.load_delta(tmp_path / f"{name}.safetensors").values for name in "ab")
    assert all(torch.allclose(v, b[name], atol=1e-6) for name, v in a.items())


def test_the_best_epoch_is_kept_and_training_ends_early(small, task, tmp_path):
    """At a rate that ruins the model the first epochs are the best; no test image has a say."""
    arguments = ["--epochs", 9, "--lr", 3, "--schedule", "constant", "--warmup", 0.8, "--val-share", 0.5]
    arguments += ["--keep", "best", "--patience", 2, "--clip-grad", 1, "--output", tmp_path / "t.safetensors"]
    found = json.loads(output("tune", *small, *arguments, "--json"))
    evals = records(tmp_path / "t.run", "eval")
    assert {r["split"] for r in evals} == {"validation"}
    best = max(range(len(evals)), key=lambda i: (evals[i]["accuracy"], -evals[i]["loss"])) + 1
    assert found["best_epoch"] == best
    assert len(evals) == min(9, best + 2)
    assert found["steps"] == len(evals) * 2  # seven images, four in a step
    assert (found["split"], found["images"]) == ("test", 7)
    # The same steps, and no more: what the best epoch left.
    shorter = [*arguments[:1], best, *arguments[2:]]
    short = tmp_path / "short.safetensors"
    shorter[-1] = short
    shorter[shorter.index("--warmup") + 1] = round(0.8 * 9 * 2) / (best * 2) if best > 7 else 1
    assert best <= 9
    values = fps.load_delta(tmp_path / "t.safetensors").values
    kept = load_file(tmp_path / "t.run/best/best.safetensors")
    assert all(torch.equal(v, kept[f"value:{name}"]) for name, v in values.items())
    last = load_file(tmp_path / "t.run/state/state.safetensors")
    assert any(not torch.equal(v, last[f"compact:{name}"]) for name, v in values.items()) or best == len(evals)


@pytest.mark.parametrize("option", [["--keep", "best"], ["--patience", 2]])
def test_test_images_choose_nothing(small, tmp_path, option):
    done = cli("tune", *small, *option, "--output", tmp_path / "t.safetensors")
    assert done.code == 2
    assert f"{' '.join(map(str, option)).split(' 2')[0]} needs validation images, since test images choose" in done.message


def test_a_validation_share_alone(small, task, tmp_path):
    arguments = ["--data", task / "train", "--val-share", 0.3, "--epochs", 2, "--output", tmp_path / "t.safetensors"]
    found = json.loads(output("tune", *small, *arguments, "--json"))
    assert (found["split"], found["images"]) == ("validation", 4)


def test_the_config_of_a_run_reproduces_it(small, tmp_path):
    arguments = [
        "--epochs",
        1,
        "--lr",
        0.01,
        "--k",
        3,
        "--exclude",
        "blocks.0.*",
        "--exclude",
        "*.qkv.*",
        "--augment",
        "none",
    ]
    output("tune", *small, *arguments, "--no-buffers", "--output", tmp_path / "a.safetensors")
    config = tmp_path / "a.run" / "config.yaml"
    given = yaml.safe_load(config.read_text())
    assert (given["model"], given["k"], given["exclude"]) == ("test_vit", 3, ["blocks.0.*", "*.qkv.*"])
    assert "output" not in given
    output("tune", "--config", config, "--output", tmp_path / "b.safetensors")
    assert_same_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_range_test_suggests_a_rate(small, tmp_path):
    found = json.loads(output("tune", *small, "--k", 2, "--find-lr", "--json"))
    assert found["rates"] == sorted(found["rates"])
    assert found["suggested"] == pytest.approx(found["rates"][found["losses"].index(min(found["losses"]))] / 10)
    assert 1e-6 < found["suggested"] < 0.1
    text = output("tune", *small, "--k", 2, "--find-lr")
    assert f"suggested: --lr {found['suggested']:.1e}" in text
    assert list(tmp_path.iterdir()) == []


def test_a_range_test_multiplies_as_training_would(small):
    """In one of three precisions, which give three losses from the first step on."""
    ways = ([], ["--autocast", "fp16"], ["--autocast", "bf16"])
    first = [json.loads(output("tune", *small, "--k", 2, "--find-lr", "--json", *way))["losses"][0] for way in ways]
    assert len(set(first)) == 3
    assert max(first) - min(first) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-share", 1], "--val-share must lie between 0 and 1, got 1.0"),
        (["--auto-augment", "rund-m9"], "--auto-augment rund-m9: timm has no such policy"),
        (["--class-weights", "nowhere.json"], "there is no file or folder nowhere.json"),
        (["--ema", 1], "Invalid value for '--ema'"),
        (["--keep-bits", 4], "Invalid value for '--keep-bits'"),
        (["--autocast", "int8"], "Invalid value for '--autocast'"),
        (["--keep-bits", 8, "--stream"], "--keep-bits does not go with --stream"),
    ],
)
def test_what_is_refused(small, tmp_path, arguments, message):
    done = cli("tune", *small, "--epochs", 1, "--output", tmp_path / "t.safetensors", *arguments)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert not (tmp_path / "t.safetensors").exists()


def test_an_output_is_needed(small):
    assert cli("tune", *small).message == "error: --output FILE is missing: where the tuned entries go"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dark": 1}', "has no number for the class 'light'"),
        ('{"dark": 1, "light": "x"}', "must map each class to a number, as JSON"),
        ('{"dark": 1, "light": 1, "grey": 1}', "has the class 'grey', which"),
        ('{"dark": 1, "light": -1}', "numbers must be positive, got -1.0"),
    ],
)
def test_class_weights_that_are_refused(small, tmp_path, content, message):
    (tmp_path / "weights.json").write_text(content)
    done = cli("tune", *small, "--class-weights", tmp_path / "weights.json", "--output", tmp_path / "t.safetensors")
    assert (done.code, message in done.message) == (2, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_is_looked_at_before_any_work(small, task, tmp_path, workers):
    data = copied(task, tmp_path / "data")
    for name in ("test/light/1.png", "train/dark/3.png", "train/light/0.png"):
        (data / name).write_bytes((data / name).read_bytes()[:300])
    done = cli("tune", *small, "--data", data, "--workers", workers, "--output", tmp_path / "t.safetensors")
    assert done.code == 2
    assert done.message.startswith(f"error: {data / 'train/dark/3.png'} cannot be read: ")
    assert done.message.endswith(f" (and {data / 'train/light/0.png'}, {data / 'test/light/1.png'})")
    assert not (tmp_path / "t.run" / "selection.safetensors").exists()
    done = cli("tune", *small, "--data", data, "--no-check-images", "--samples", 2, "--output", tmp_path / "t.safetensors")
    assert (done.code, "(and " in done.err) == (2, False)


@pytest.mark.parametrize(
    ("budget", "rate"),
    [([], 1e-3), (["--k", 4], 1e-3), (["--k", 16], 3e-4), (["--k", 40], 1e-4), (["--density", 0.25], 3e-4)],
)
def test_the_rate_is_that_of_the_budget(small, tmp_path, budget, rate):
    output("tune", *small, *budget, "--epochs", 1, "--warmup", 0, "--output", tmp_path / "t.safetensors")
    settings = json.loads((tmp_path / "t.run" / "settings.json").read_text())
    assert (settings["lr"], settings["lr_head"]) == (rate, 3e-3)
    selection = tmp_path / "t.run" / "selection.safetensors"
    arguments = ["--selection", selection, "--epochs", 1, "--lr-head", 0.01, "--output", tmp_path / "u.safetensors"]
    output("tune", *small, *arguments)
    settings = json.loads((tmp_path / "u.run" / "settings.json").read_text())
    assert (settings["lr"], settings["lr_head"]) == (rate, 0.01)
