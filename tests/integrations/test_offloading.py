"""Models whose weights accelerate keeps in main memory or on disk."""

import copy

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
def test_the_same_choice_with_one_visit_a_batch(tmp_path, monkeypatch, where, budget):
    model, data = vit(), [torch.randn(4, 3, 32, 32) for _ in range(2)]
    expected = fps.select(model, data, budget=budget)
    away = offload(copy.deepcopy(model), where, tmp_path)
    visits: dict[int, int] = {}
    real = AlignDevicesHook.pre_forward

    def counted(self, module, *args, **kwargs):
        visits[id(module)] = visits.get(id(module), 0) + 1
        return real(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    selection = fps.select(away, data, budget=budget, progress=False)
    assert list(selection) == list(expected)
    for name, w in selection.items():
        assert torch.equal(w.columns, expected[name].columns), name
        assert torch.equal(w.row_offsets, expected[name].row_offsets), name
        assert visits[id(away.get_submodule(name.rpartition(".")[0]))] == len(data)
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
