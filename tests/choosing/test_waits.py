"""A choice waits for the GPU once, at its end, whatever the number of weights and batches."""

import pytest
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.choosing import best_entries
from fps_kernels.choosing.statistics import WeightStats
from fps_kernels.weights.matrix import MatrixLayout
from tests.support.models import Classifier, images
from tests.support.pretended_gpu import WaitError, pretended_gpu


@pytest.fixture
def gpu():
    with pretended_gpu() as found:
        yield found


class Many(nn.Module):
    """Linear maps, a grouped and a channels-last convolution, attention with three inputs, a transposed linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.embed.weight = nn.Parameter(torch.randn(16, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.transposed = nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.zeros(24))
        self.layers = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.grouped(self.embed(x)).flatten(2).mT
        x = self.attention(x, x.flip(1), x.roll(1, 1), need_weights=False)[0]
        x = torch.addmm(self.bias, x.flatten(0, 1), self.transposed).view(*x.shape[:2], 24)
        return self.head(self.layers(x).mean(1))


def made():
    with torch.device("cuda"):
        return Many(), [images(6) for _ in range(3)]


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("budget", [fps.PerNeuron(2), fps.PerTensor(0.1), fps.LikeLoRA(1), fps.Global(0.1)], ids=repr)
def test_a_choice_waits_once(gpu, budget, micro_batch):
    model, data = made()
    with gpu.waiting(1) as waits:
        selection = fps.select(model, data, budget=budget, micro_batch=micro_batch, progress=False)
    assert len(selection) == 11
    assert len(waits) == 1


@pytest.mark.parametrize("scorer", [fps.Wanda(), fps.Magnitude(), fps.Random(seed=0)], ids=repr)
def test_no_scorer_waits(gpu, scorer):
    model, data = made()
    with gpu.waiting(1):
        fps.select(model, data, scorer=scorer, progress=False)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_statistics_and_an_anchor_from_elsewhere_do_not_wait(gpu, where):
    model, data = made()
    with gpu.waiting(1):
        stats = fps.calibrate(model, data, progress=False)
    weights = {n: WeightStats(w.layout, torch.ones(w.norm.shape).double(), w.rows, w.calls) for n, w in stats.items()}
    anchor = stats if where == "cuda" else fps.ActivationStats(1, weights, stats.unused, stats.tied)
    with gpu.waiting(1):
        fps.select(model, data, scorer=fps.GrowthDriven(anchor), progress=False)
    with gpu.waiting(1):
        assert fps.select(model, stats=anchor, progress=False)["layers.0.weight"].columns.is_cuda


def test_a_calibration_waits_once(gpu):
    model, data = made()
    with gpu.waiting(1) as waits:
        fps.calibrate(model, data, progress=False, micro_batch=2)
    assert len(waits) == 1


def test_batches_of_the_host_are_copied_without_a_wait(gpu):
    model, _ = made()
    with gpu.waiting(1):
        fps.select(model, [(images(6), torch.zeros(6))], micro_batch=4, progress=False)


def test_gradients_are_chosen_from_with_one_wait(gpu):
    """GPS, the baseline: its loss is the user's."""
    model, data = made()
    target = torch.zeros(6, dtype=torch.int64, device="cuda")
    with gpu.waiting(1):
        fps.gps_select(model, [(data[0], target)], loss="cross_entropy", progress=False)


def test_a_wait_that_is_planted_in_a_scorer_is_found(gpu):
    class Waiting(fps.FPS):
        def factors(self, stats, name):
            return stats[name].mean().cpu()

    model, data = made()
    with gpu.waiting(1), pytest.raises(WaitError, match=r"stats\[name\]\.mean\(\)\.cpu\(\)"):
        fps.select(model, data, scorer=Waiting(), progress=False)


def test_a_mean_of_blocks_with_other_numbers_of_rows():
    norm = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    stats = WeightStats(MatrixLayout((6, 4)), norm, (7, 3, 7), 3)
    assert torch.equal(stats.mean(), norm / torch.tensor([[7.0], [3.0], [7.0]], dtype=torch.float64))
    assert torch.equal(WeightStats(MatrixLayout((6, 4)), norm, (7, 7, 7), 3).mean(), norm / 7)


@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerTensor(0.1), fps.Global(0.1)], ids=repr)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_what_is_not_finite_is_named_at_the_end(monkeypatch, budget, as_on_a_gpu):
    """Activations first, then weights in their order, as when each was looked at by itself."""
    monkeypatch.setattr(best_entries, "_would_wait", lambda tensor: as_on_a_gpu)
    model = Classifier()
    data = [images()]
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
        model.hidden.weight[1, 1] = float("inf")
    stats = fps.calibrate(Classifier(), data)
    with pytest.raises(ValueError, match="the scores of hidden.weight contain NaN or Inf: check the weight"):
        fps.select(model, stats=stats, budget=budget)
    with pytest.raises(ValueError, match="the activations that reach out.weight and 1 more weights contain NaN or Inf"):
        fps.select(model, data, budget=budget)


def test_weights_that_compete_are_looked_at_exactly_only_where_a_bound_is_not_finite(monkeypatch):
    monkeypatch.setattr(best_entries, "_would_wait", lambda tensor: True)
    looked = []
    exact = best_entries._largest_score
    monkeypatch.setattr(best_entries, "_largest_score", lambda w, chosen: looked.append(w.name) or exact(w, chosen))
    model = Classifier()
    stats = fps.calibrate(model, [images()])
    expected = fps.select(model, stats=stats, budget=fps.Global(0.1), progress=False)
    assert not looked
    with torch.no_grad():  # times a factor that is no input of the same column: the bound overflows, no score does
        model.hidden.weight[0] *= 1e38 * (torch.arange(model.hidden.weight.shape[1]) == 0)
    factors = torch.ones(model.hidden.weight.shape[1])
    factors[1] = 1e38
    found = fps.select(model, scorer=Fixed("hidden.weight", factors), stats=stats, budget=fps.Global(0.1), progress=False)
    assert looked == ["hidden.weight"]
    assert len(found) == len(expected)


class Fixed(fps.FPS):
    """Factors of one weight that are given, and those of FPS otherwise."""

    def __init__(self, name: str, factors: torch.Tensor) -> None:
        self.name, self.given = name, factors

    def factors(self, stats, name):
        return self.given[None] if name == self.name else super().factors(stats, name)
