"""One pass over the data: what is fed, what adds up, what is refused."""

import copy
import os

import pytest
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.storage import checked_file
from tests.support.models import Classifier, images, labelled


def assert_same(a: fps.ActivationStats, b: fps.ActivationStats) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].layout == b[name].layout
        assert a[name].rows == b[name].rows
        torch.testing.assert_close(a[name].norm, b[name].norm, rtol=1e-5, atol=0)


def test_norms_are_those_of_the_inputs():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(2, 5, 4)
    for ord, expected in ((1, x.abs().sum((0, 1))), (2, (x**2).sum((0, 1))), (float("inf"), x.abs().amax((0, 1)))):
        stats = fps.calibrate(model, [x], ord=ord)
        torch.testing.assert_close(stats["0.weight"].norm[0], expected.double(), rtol=1e-5, atol=0)
        assert stats["0.weight"].rows == (10,)
        assert stats["0.weight"].calls == 1


def test_every_kind_of_batch():
    model, (x, y) = Classifier(), labelled()
    expected = fps.calibrate(model, [x])

    class ByKeyword(Classifier):
        def forward(self, *, pixels):
            return super().forward(pixels)

    keyword = ByKeyword()
    keyword.load_state_dict(model.state_dict())
    assert_same(fps.calibrate(model, [(x, y)]), expected)
    assert_same(fps.calibrate(model, [[x, y]]), expected)
    assert_same(fps.calibrate(keyword, [{"pixels": x}]), expected)
    assert_same(fps.calibrate(model, [("text", x)], forward=lambda m, batch: m(batch[1])), expected)
    assert_same(fps.calibrate(model, iter(x.split(4))), expected)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    assert_same(fps.calibrate(model, loader), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_micro_batches_add_up(size):
    model, x = Classifier(), images()
    assert_same(fps.calibrate(model, [x], micro_batch=size), fps.calibrate(model, [x]))


def test_merge_is_one_pass_over_both(tmp_path):
    model, x = Classifier(), images(9)
    parts = [fps.calibrate(model, [part]) for part in x.split([2, 7])]
    assert_same(parts[0].merge(parts[1]), fps.calibrate(model, [x]))
    with pytest.raises(ValueError, match="other has ord=2"):
        parts[0].merge(fps.calibrate(model, [x], ord=2))
    with pytest.raises(ValueError, match="other covers different weights"):
        parts[0].merge(fps.calibrate(nn.Linear(8, 2), [x]))


def test_save_and_load(tmp_path):
    stats = fps.calibrate(Classifier(), [images()])
    stats.save(tmp_path / "stats.safetensors")
    loaded = fps.ActivationStats.load(tmp_path / "stats.safetensors")
    assert_same(loaded, stats)
    assert (loaded.ord, loaded.unused, loaded.tied) == (stats.ord, stats.unused, stats.tied)
    fps.select(Classifier(), stats=stats).save(tmp_path / "selection.safetensors")
    with pytest.raises(ValueError, match="holds no activation statistics"):
        fps.ActivationStats.load(tmp_path / "selection.safetensors")
    content, tensors = checked_file.read(tmp_path / "stats.safetensors", "fps_kernels.statistics.1", "activation statistics")
    for lie in ({"ord": "3"}, {"weights": {"x": [[2, 2], False, [1], 1]}}, {"tied": [1]}, {"unused": {"a": None}}):
        checked_file.write(tmp_path / "lie.safetensors", "fps_kernels.statistics.1", {**content, **lie}, tensors)
        with pytest.raises(ValueError, match="lie.safetensors is damaged"):
            fps.ActivationStats.load(tmp_path / "lie.safetensors")


def _reduce(rank: int, directory: str, parts: list[torch.Tensor], model: nn.Module) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    stats = fps.calibrate(model, [parts[rank]])
    stats.all_reduce()
    stats.save(os.path.join(directory, f"{rank}.safetensors"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["same weights", "an expert each"])
def test_several_processes(tmp_path, kind):
    if kind == "same weights":
        model, x = Classifier(), images(7)
        parts = [x[::2], x[1::2]]
    else:
        x = torch.randn(7, 4).abs()
        model, parts = Experts(), [x, -x]
    torch.multiprocessing.spawn(_reduce, (str(tmp_path), parts, model), nprocs=2)
    for rank in range(2):
        reduced = fps.ActivationStats.load(tmp_path / f"{rank}.safetensors")
        assert_same(reduced, fps.calibrate(model, parts))
        assert reduced.unused == fps.calibrate(model, parts).unused


def test_attention_with_different_inputs_has_one_factor_per_block_of_rows():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    stats = fps.calibrate(attention, [(query, key)], forward=lambda m, batch: m(batch[0], batch[1], batch[1]))
    found = stats["in_proj_weight"]
    assert found.rows == (6, 10, 10)
    torch.testing.assert_close(found.mean()[0], query.abs().mean((0, 1)).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean()[2], key.abs().mean((0, 1)).double(), rtol=1e-5, atol=0)


class Shared(nn.Module):
    """One weight used twice in a forward, one under two names, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.never = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(self.twice(self.twice(x))))


def test_weights_used_twice_tied_and_never():
    stats = fps.calibrate(Shared(), [torch.randn(3, 4)])
    assert stats["twice.weight"].calls == 2
    assert stats["twice.weight"].rows == (6,)
    assert stats["first.weight"].rows == (6,)
    assert stats.tied == {"second.weight": "first.weight"}
    assert stats.unused == {"never.weight": "it was never used in the forward pass"}


def test_autocast_and_low_precision_models():
    model, x = Classifier(), images()
    expected = fps.calibrate(model, [x])
    with torch.autocast("cpu", torch.bfloat16):
        got = fps.calibrate(model, [x])
    half = fps.calibrate(copy.deepcopy(model).bfloat16(), [x.bfloat16()])
    for other in (got, half):
        for name in expected:
            torch.testing.assert_close(other[name].norm, expected[name].norm, rtol=0.05, atol=0.05)


def test_compiled_models_are_seen():
    model, x = Classifier(), images()
    stats = fps.calibrate(torch.compile(model), [x])
    assert {name.removeprefix("_orig_mod.") for name in stats} == set(fps.calibrate(model, [x]))


def test_exported_programs_are_seen():
    model, x = Classifier(), images()
    program = torch.export.export(model.eval(), (x,)).module()
    assert_same(fps.calibrate(program, [x]), fps.calibrate(model, [x]))


def test_the_model_is_left_as_found():
    model = Classifier().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fps.calibrate(model, [images()])

    def fail(m, batch):
        m(batch)
        raise RuntimeError("out of luck")

    with pytest.raises(ValueError, match=r"failed on batch 0 of data, a float32 tensor .* RuntimeError: out of luck"):
        fps.calibrate(model, [images()], forward=fail)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.embed._forward_hooks
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("data", [[], iter([])])
def test_no_data(data):
    with pytest.raises(ValueError, match="data gave no batch"):
        fps.calibrate(Classifier(), data)


def test_bad_input():
    model, x = Classifier(), images()
    with pytest.raises(ValueError, match="ord must be 1, 2 or inf"):
        fps.calibrate(model, [x], ord=3)
    with pytest.raises(ValueError, match="micro_batch must be at least 1"):
        fps.calibrate(model, [x], micro_batch=0)
    with pytest.raises(ValueError, match="max_batches must be at least 1"):
        fps.calibrate(model, [x], max_batches=0)
    with pytest.raises(ValueError, match=r"batch 1 of data, a float32 tensor of shape \[6, 4, 8, 8\]"):
        fps.calibrate(model, [x, torch.randn(6, 4, 8, 8)])
    with pytest.raises(ValueError, match="batch 0 of data, a mapping with the keys"):
        fps.calibrate(model, [{"pixels": x}])
    with pytest.raises(ValueError, match="empty tuple"):
        fps.calibrate(model, [()])
    with pytest.raises(ValueError, match="position is on the meta device"):
        fps.calibrate(Classifier().to("meta"), [x])
    for data, match in (
        (x, r"data must be an iterable of batches, got a float32 tensor of shape \[6, 3, 8, 8\]: put a single batch"),
        ({"x": x}, r"data must be an iterable of batches, got a mapping with the keys \['x'\]"),
        (5, "data must be an iterable of batches, got a int"),
    ):
        with pytest.raises(TypeError, match=match):
            fps.calibrate(model, data)
    with pytest.raises(ValueError, match="batch 0 of data, a str: AttributeError"):
        fps.calibrate(model, ["path.png"], forward=lambda m, batch: m(batch.float()))
    with pytest.raises(ValueError, match="micro_batch finds no tensor to split in a str"):
        fps.calibrate(model, ["path.png"], forward=lambda m, batch: m(x), micro_batch=2)
    with pytest.raises(ValueError, match=r"0.weight has no shape yet"):
        fps.calibrate(nn.Sequential(nn.LazyLinear(3)), [x])


class Experts(nn.Module):
    """A mixture: rows go to the expert of their sign; an expert may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        return [expert(x[chosen]) for expert, chosen in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True)]


def test_experts_without_a_token():
    x = torch.randn(6, 4).abs()
    model = Experts()
    some, rest = fps.calibrate(model, [x]), fps.calibrate(model, [-x])
    assert some.unused == {"experts.1.weight": "all its inputs were empty"}
    assert_same(some.merge(rest), fps.calibrate(model, [x, -x]))
    assert some.merge(rest).unused == {}
    assert list(fps.select(model, [x])) == ["experts.0.weight"]


def test_weights_of_other_dtypes_do_not_stop_the_pass():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4).double()

        def forward(self, x):
            return self.high(self.low(x).double())

    stats = fps.calibrate(Mixed(), [torch.randn(3, 4)])
    assert list(stats) == ["low.weight"]
    assert stats.unused == {"high.weight": "its dtype is torch.float64, not float32, bfloat16 or float16"}


def test_torchscript_is_named_as_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    unused = fps.calibrate(model, [torch.randn(3, 4)]).unused
    assert list(unused) == ["1.weight"]
    assert unused["1.weight"].startswith("it belongs to a TorchScript module")


def test_modules_that_act_on_train_and_eval_are_left_alone():
    """LoRA layers merge their weights in ``eval()`` and take them apart again in ``train()``."""

    class Merging(nn.Linear):
        switched = 0

        def train(self, mode=True):
            self.switched += 1
            return super().train(mode)

    model = nn.Sequential(Merging(4, 4), nn.Dropout(1.0), nn.Linear(4, 4)).train()
    stats = fps.calibrate(model, [torch.ones(3, 4)])
    assert model[0].switched == 1  # by the test itself
    assert all(module.training for module in model.modules())
    assert stats["2.weight"].norm.any()  # no dropout: the pass ran in evaluation mode


def test_mappings_of_any_type_are_split():
    from transformers import BatchEncoding

    class Watched(nn.Linear):
        seen: list

        def forward(self, x, scale):
            self.seen.append(tuple(x.shape))
            return super().forward(x * scale["by"])

    model, x = Watched(4, 3), torch.randn(5, 4)
    model.seen = []
    batch = BatchEncoding({"x": x, "scale": {"by": torch.tensor(2.0)}})
    kept = fps.calibrate(model, [batch], micro_batch=2, forward=lambda m, b: m(b.x, b.scale))
    assert model.seen == [(2, 4), (2, 4), (1, 4)]
    assert batch["x"] is x
    torch.testing.assert_close(kept["weight"].norm[0], 2 * x.abs().sum(0).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_weight(bad):
    x = images()
    x[2, 1, 3, 3] = bad
    with pytest.raises(ValueError, match=r"activations that reach embed.weight and 3 more weights contain NaN or Inf"):
        fps.calibrate(Classifier(), [x])


def test_progress_bar(capfd):
    fps.calibrate(Classifier(), [images()], progress=True)
    assert "calibrate" in capfd.readouterr().err
    fps.calibrate(Classifier(), [images()], progress=False)
    assert capfd.readouterr().err == ""
