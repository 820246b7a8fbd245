"""Choices on a device are those of the CPU from the same statistics, and the statistics are its sums."""

import copy

import pytest
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.choosing.statistics import WeightStats
from tests.support.models import Classifier, images, labelled

BUDGETS = [fps.PerNeuron(1), fps.PerNeuron(5), fps.PerTensor(0.1), fps.LikeLoRA(1), fps.Global(0.05)]


class Grouped(nn.Module):
    """Grouped and channels-last convolutions, and attention with three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4).to(memory_format=torch.channels_last)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.grouped(self.embed(x)).flatten(2).mT
        return self.head(self.attention(x, x.flip(1), x.roll(1, 1), need_weights=False)[0].mean(1))


def on(device, stats):
    weights = {n: WeightStats(w.layout, w.norm.to(device), w.rows, w.calls) for n, w in stats.items()}
    return fps.ActivationStats(stats.ord, weights, stats.unused, stats.tied)


def assert_same(first, second):
    assert first.weights.keys() == second.weights.keys()
    for name, entries in first.items():
        assert torch.equal(entries.row_offsets.cpu(), second[name].row_offsets.cpu()), name
        assert torch.equal(entries.columns.cpu(), second[name].columns.cpu()), name


@pytest.mark.parametrize("create", [Classifier, Grouped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_choices_from_the_same_statistics(device, budget, dtype, create):
    model = create()
    stats = fps.calibrate(model, [images()])
    model = model.to(dtype)
    there = copy.deepcopy(model).to(device)
    expected = fps.select(model, stats=stats, budget=budget)
    found = fps.select(there, stats=on(device, stats), budget=budget)
    assert_same(found, expected)
    assert all(w.columns.device.type == device.type for w in found.weights.values())
    assert_same(fps.select(there, stats=stats, budget=budget), expected)  # of a file, which the CPU has


@pytest.mark.parametrize("ord", [1, 2, float("inf")])
@pytest.mark.parametrize("create", [Classifier, Grouped])
def test_statistics(device, create, ord):
    model, data = create(), [images() for _ in range(3)]
    there = copy.deepcopy(model).to(device)
    expected = fps.calibrate(model, data, ord=ord)
    for micro_batch in (None, 2):
        found = fps.calibrate(there, data, ord=ord, micro_batch=micro_batch)
        for name, stats in expected.items():
            torch.testing.assert_close(found[name].norm.cpu(), stats.norm, rtol=1e-4, atol=1e-6)
            assert found[name].rows == stats.rows


@pytest.mark.parametrize("scorer", [fps.Wanda(), fps.Magnitude(), fps.Random(seed=3)], ids=repr)
def test_scorers(device, scorer):
    model = Classifier()
    stats = fps.calibrate(model, [images()], ord=1 if scorer.ord is None else scorer.ord)
    expected = fps.select(model, stats=stats, scorer=scorer)
    assert_same(fps.select(copy.deepcopy(model).to(device), stats=on(device, stats), scorer=scorer), expected)


def test_an_anchor_from_a_file(device):
    model = Classifier()
    stats, anchor = fps.calibrate(model, [images()]), fps.calibrate(model, [images()])
    expected = fps.select(model, stats=stats, scorer=fps.GrowthDriven(anchor))
    there = copy.deepcopy(model).to(device)
    found = fps.select(there, stats=on(device, stats), scorer=fps.GrowthDriven(anchor))
    common = found.to("cpu").overlap(expected)
    assert common > 0.99  # a mean over the columns is summed in another order


@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerTensor(0.1), fps.Global(0.1)], ids=repr)
def test_what_is_not_finite_is_named(device, budget):
    model = Classifier().to(device)
    stats = fps.calibrate(model, [images()])
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the scores of out.weight contain NaN or Inf"):
        fps.select(model, stats=stats, budget=budget)
    with pytest.raises(ValueError, match="the activations that reach head.weight contain NaN or Inf|contain NaN or Inf"):
        fps.select(model, [images() * float("inf")], budget=budget)


def test_gradients(device):
    model, batch = Classifier(), labelled()
    expected = fps.gps_select(model, [batch], loss="cross_entropy", budget=fps.PerTensor(0.1))
    found = fps.gps_select(copy.deepcopy(model).to(device), [batch], loss="cross_entropy", budget=fps.PerTensor(0.1))
    assert found.to("cpu").overlap(expected) > 0.99


def test_the_drop_in_functions(device):
    W, x = torch.randn(40, 33), torch.randn(7, 9, 33)
    for ord in (1, 2, float("inf")):
        torch.testing.assert_close(
            fps.column_norm(x.to(device), ord=ord).cpu(), fps.column_norm(x, ord=ord), rtol=1e-5, atol=0
        )
    a = fps.column_norm(x)
    assert torch.equal(fps.score_topk(W.to(device), a.to(device), 3).cpu(), fps.score_topk(W, a, 3))
