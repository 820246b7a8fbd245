"""Models whose weights accelerate keeps in main memory or on disk."""

import copy
import threading

import accelerate
import pytest
import timm
import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

import fps_kernels as fps


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=48, num_heads=3).eval()


def offload(model: nn.Module, where: str, folder) -> nn.Module:
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("budget", [fps.PerNeuron(2), fps.PerTensor(0.02)])
@pytest.mark.parametrize(("at_once", "visited"), [(32, 1), (2, 2), (1, 3)])
def test_the_same_choice_with_one_visit_for_batches_that_go_together(tmp_path, monkeypatch, where, budget, at_once, visited):
    model, data = vit(), [torch.randn(4, 3, 32, 32) for _ in range(3)]
    expected = fps.select(model, data, budget=budget)
    away = offload(copy.deepcopy(model), where, tmp_path)
    visits: dict[int, int] = {}
    real = AlignDevicesHook.pre_forward

    def counted(self, module, *args, **kwargs):
        visits[id(module)] = visits.get(id(module), 0) + bool(self.offload)
        return real(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    selection = fps.select(away, data, budget=budget, batches_at_once=at_once, progress=False)
    assert list(selection) == list(expected)
    for name, w in selection.items():
        assert torch.equal(w.columns, expected[name].columns), name
        assert torch.equal(w.row_offsets, expected[name].row_offsets), name
        assert visits[id(away.get_submodule(name.rpartition(".")[0]))] == visited
    assert selection.dense == expected.dense
    weights = [away.get_submodule(name.rpartition(".")[0]).weight for name in selection]
    assert all(p.is_meta for p in weights)  # none stays behind


class Twice(nn.Module):
    """A layer that is used two times: what its first use chose from was not all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(x).square() * 3))


def test_weights_that_are_used_again_and_scores_that_are_not_finite():
    torch.manual_seed(2)
    model, data = Twice(), [torch.randn(6, 12)]
    expected = fps.select(model, data, dense=[], progress=False)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    found = fps.select(away, data, dense=[], progress=False)
    assert all(torch.equal(found[name].columns, w.columns) for name, w in expected.items())
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    away = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="the scores of head.weight contain NaN or Inf: check the weight"):
        fps.select(away, data, dense=[], progress=False)


def test_statistics_and_other_scorers(tmp_path):
    model, data = vit(), [torch.randn(4, 3, 32, 32)]
    away = offload(copy.deepcopy(model), "disk", tmp_path)
    stats = fps.calibrate(away, data, ord=2)
    expected = fps.calibrate(model, data, ord=2)
    assert set(stats) == set(expected)
    assert all(torch.equal(stats[name].norm, expected[name].norm) for name in expected)
    chosen = fps.select(away, stats=stats, scorer=fps.Wanda())
    assert chosen.overlap(fps.select(model, stats=expected, scorer=fps.Wanda())) == 1
    drawn = fps.select(away, data, scorer=fps.Random(3), budget=fps.Global(0.01))
    assert drawn.overlap(fps.select(model, data, scorer=fps.Random(3), budget=fps.Global(0.01))) == 1


def test_what_needs_every_weight_at_once_is_refused():
    away = offload(vit(), "cpu", None)
    with pytest.raises(ValueError, match=r"a Global budget compares all weights, and .* is offloaded"):
        fps.select(away, [torch.randn(2, 3, 32, 32)], budget=fps.Global(0.01))
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        fps.attach(away, {"head.weight": torch.ones(5, 48, dtype=torch.bool)})


class Branching(nn.Module):
    """Passes take different ways, meet, and go through a shared block twice; a parameter of the model's own is used last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.ways = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(2))
        self.shared, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, way: int = 0) -> torch.Tensor:
        x = self.shared(self.ways[way](self.shared(x)))
        return self.last(x * self.scale) * self.scale


WAYS = [{"x": torch.randn(3, 12, generator=torch.Generator().manual_seed(i)), "way": i % 2} for i in range(5)]


def test_passes_that_take_different_ways():
    torch.manual_seed(3)
    model = Branching()
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    for ord in (1, 2):
        expected, found = fps.calibrate(model, WAYS, ord=ord), fps.calibrate(away, WAYS, ord=ord)
        assert found.weights.keys() == expected.weights.keys()
        for name, stats in expected.items():
            torch.testing.assert_close(found[name].norm, stats.norm, rtol=1e-12, atol=0)
            assert (found[name].rows, found[name].calls) == (stats.rows, stats.calls)
    assert fps.select(away, WAYS, dense=[]).overlap(fps.select(model, WAYS, dense=[])) == 1
    assert all(p.is_meta for p in away.parameters())


def test_a_pass_that_fails_ends_the_others_and_leaves_the_model_as_it_was():
    away = accelerate.cpu_offload(Branching(), execution_device="cpu")
    hooks = {module: module._hf_hook for module in away.modules() if hasattr(module, "_hf_hook")}
    before = threading.active_count()
    for wrong in ({"x": torch.randn(3, 12), "way": 7}, {"x": torch.randn(3, 11)}):
        with pytest.raises(ValueError, match="forward failed on batch 2 of data"):
            fps.select(away, [*WAYS[:2], wrong, *WAYS[2:]], dense=[])
        assert threading.active_count() == before
        assert all(p.is_meta for p in away.parameters())
        assert all(module._hf_hook is hook for module, hook in hooks.items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in away.modules())
    fps.select(away, WAYS, dense=[])


def test_whoever_interrupts_a_pass_interrupts_all(monkeypatch):
    away, calls = accelerate.cpu_offload(Branching(), execution_device="cpu"), []

    def forward(model, batch):
        try:
            model(**batch)
        except Exception:
            calls.append("a model that catches what it should not")
        if batch is WAYS[3]:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fps.calibrate(away, WAYS, forward=lambda model, batch: forward(model, next(w for w in WAYS if w["x"] is batch["x"])))
    assert (threading.active_count(), calls) == (before, [])


def test_passes_see_what_surrounds_the_call():
    away, seen = accelerate.cpu_offload(Branching(), execution_device="cpu"), []

    def forward(model, batch):
        y = model(**batch)
        seen.append((y.dtype, torch.is_grad_enabled(), torch.ones(1).dtype, y.requires_grad))

    found = torch.get_default_dtype()
    with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        report = fps.memory.measure(lambda: fps.calibrate(away, WAYS, forward=forward))
    assert seen == [(torch.float32, False, found, False)] * len(WAYS)  # a bfloat16 output times a float32 parameter
    assert report.added > sum(w["x"].nbytes for w in WAYS)  # what passes compute is seen by whoever looks at tensors

    alone = fps.memory.measure(lambda: fps.calibrate(away, WAYS, forward=forward, batches_at_once=1))
    assert report.added >= alone.added


def test_few_blocks_are_there_at_once():
    def model() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(16)), nn.Linear(64, 5))

    away = accelerate.cpu_offload(model(), execution_device="cpu")
    block = sum(p.nbytes for p in model()[0].parameters())
    most = []

    def look(module, args):
        most.append(sum(p.nbytes for p in away.parameters() if not p.is_meta))

    for m in away.modules():
        m.register_forward_pre_hook(look)
    fps.calibrate(away, [torch.randn(2, 64) for _ in range(4)])
    assert 0 < max(most) <= 2 * block
    with pytest.raises(ValueError, match="batches_at_once must be at least 1, got 0"):
        fps.calibrate(away, [torch.randn(2, 64)], batches_at_once=0)
