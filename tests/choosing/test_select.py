"""``select``: exact counts for every scorer and budget, the roles of parameters, and bad input."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fps_kernels as fps
from fps_kernels.choosing.budgets import _draw_distinct
from fps_kernels.weights.matrix import MatrixLayout
from tests.support.models import Classifier, images, labelled

WEIGHTS = {"embed.weight": (12, 48), "hidden.weight": (20, 12), "out.weight": (12, 20)}
SCORERS = [fps.FPS(), fps.Wanda(), fps.Magnitude(), fps.Random(3)]


def scores_of(model: nn.Module, scorer, data) -> dict[str, torch.Tensor]:
    """The score matrices that the library never makes, from first principles."""
    if isinstance(scorer, fps.Magnitude):
        return {n: model.get_parameter(n).detach().flatten(1).abs() for n in WEIGHTS}
    stats = fps.calibrate(model, data, ord=2 if isinstance(scorer, fps.Wanda) else 1)
    factor = {n: s.norm.sqrt() if isinstance(scorer, fps.Wanda) else s.norm / s.rows[0] for n, s in stats.items()}
    return {n: model.get_parameter(n).detach().flatten(1).abs() * factor[n].float() for n in WEIGHTS}


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_per_neuron(scorer, k):
    model, data = Classifier(), [images()]
    selection = fps.select(model, data, scorer=scorer, budget=fps.PerNeuron(k))
    for name in WEIGHTS:
        assert selection[name].row_offsets.diff().eq(k).all()
        if not isinstance(scorer, fps.Random):
            best = scores_of(model, scorer, data)[name].topk(k).indices.sort(1).values
            assert torch.equal(selection[name].columns.view(-1, k).long(), best)


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_per_tensor_and_global(scorer, density):
    model, data = Classifier(), [images()]
    each = fps.select(model, data, scorer=scorer, budget=fps.PerTensor(density))
    together = fps.select(model, data, scorer=scorer, budget=fps.Global(density))
    total = sum(math.prod(shape) for shape in WEIGHTS.values())
    assert {n: w.nnz for n, w in each.items()} == {n: max(1, round(density * math.prod(s))) for n, s in WEIGHTS.items()}
    assert together.nnz == max(1, round(density * total))
    if not isinstance(scorer, fps.Random):
        scores = scores_of(model, scorer, data)
        for name in WEIGHTS:
            worst = scores[name][each[name].mask().flatten(1)].min()
            assert int((scores[name] > worst).sum()) < each[name].nnz
        chosen = torch.cat([scores[n][together[n].mask().flatten(1)] for n in WEIGHTS])
        assert int((torch.cat([s.flatten() for s in scores.values()]) > chosen.min()).sum()) < together.nnz


def test_random_is_seeded_and_spread():
    model, data = Classifier(), [images()]
    for budget in (fps.PerNeuron(2), fps.PerTensor(0.1), fps.Global(0.1)):
        a, b, c = (fps.select(model, data, scorer=fps.Random(seed), budget=budget) for seed in (1, 1, 2))
        assert a.overlap(b) == 1.0
        assert a.overlap(c) < 0.6
        assert a["embed.weight"].columns.unique().numel() > 10


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 2**31))
def test_drawn_numbers_are_distinct(total, count, seed):
    count = min(count, total)
    drawn = _draw_distinct(total, count, torch.Generator().manual_seed(seed))
    assert drawn.numel() == count
    assert drawn.unique().numel() == count
    if count:
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < total


def test_growth_driven():
    model, data = Classifier(), [images()]
    anchor = fps.calibrate(model, [images(20)])
    scorer = fps.GrowthDriven(anchor)
    selection = fps.select(model, data, scorer=scorer)
    stats = fps.calibrate(model, data)
    factor = stats["hidden.weight"].mean() / anchor["hidden.weight"].mean()
    best = (model.hidden.weight.abs() * factor.float()).argmax(1)
    assert torch.equal(selection["hidden.weight"].columns.long(), best)
    with pytest.raises(ValueError, match="anchor must have ord=1"):
        fps.GrowthDriven(fps.calibrate(model, data, ord=2))
    with pytest.raises(TypeError, match="anchor must be ActivationStats"):
        fps.GrowthDriven("anchor.safetensors")
    with pytest.raises(ValueError, match="eps must be positive"):
        fps.GrowthDriven(anchor, eps=0)
    with pytest.raises(ValueError, match=r"anchor has no statistics of embed.weight"):
        fps.select(model, data, scorer=fps.GrowthDriven(fps.calibrate(nn.Linear(8, 3), [images()])))


def test_a_column_that_was_silent_in_pre_training():
    model = nn.Linear(4, 3)
    silent = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    scorer = fps.GrowthDriven(fps.calibrate(model, [silent]))
    selection = fps.select(model, [torch.ones(1, 4)], scorer=scorer, budget=fps.PerNeuron(1))
    assert selection["weight"].columns.tolist() == [2, 2, 2]
    everything_silent = fps.GrowthDriven(fps.calibrate(model, [torch.zeros(1, 4)]))
    assert fps.select(model, [torch.ones(1, 4)], scorer=everything_silent).nnz == 3


def test_an_anchor_with_other_blocks_of_rows():
    """Attention of an input to itself multiplies all rows with one input; attention to another input has three."""
    attention, x, y = nn.MultiheadAttention(8, 2), torch.rand(3, 2, 8), torch.rand(3, 2, 8)
    one = fps.calibrate(attention, [x], forward=lambda m, q: m(q, q, q))
    three = fps.calibrate(attention, [x], forward=lambda m, q: m(q, y, y))
    assert (len(one["in_proj_weight"].norm), len(three["in_proj_weight"].norm)) == (1, 3)
    for anchor, now in ((one, three), (three, one)):
        factors = fps.GrowthDriven(anchor).factors(now, "in_proj_weight")
        expected = now["in_proj_weight"].mean() / anchor["in_proj_weight"].mean()
        torch.testing.assert_close(factors, expected, rtol=1e-4, atol=0)


def test_grouped_convolutions_use_the_factors_of_their_group():
    model = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = torch.rand(2, 4, 5, 5) * torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 4, 1, 1)
    selection = fps.select(model, [x], budget=fps.PerNeuron(9))
    channels = selection["weight"].columns.view(6, 9) // 9
    assert channels.tolist() == [[1] * 9] * 3 + [[0] * 9] * 3


def test_channels_last_makes_the_same_choice():
    model, data = Classifier(), [images()]
    expected = fps.select(model, data, budget=fps.PerNeuron(3))
    got = fps.select(copy.deepcopy(model).to(memory_format=torch.channels_last), data, budget=fps.PerNeuron(3))
    assert got.overlap(expected) == 1.0


@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerTensor(0.001)], ids=repr)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_choosing_adds_a_vector_per_layer(budget, memory_format):
    """At most one float64 vector per weight and float32 factors, and one copied convolution at a time."""
    model = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(12)]).to(memory_format=memory_format)
    stats = fps.calibrate(model, [torch.randn(1, 32, 4, 4)])
    report = fps.memory.measure(lambda: fps.select(model, stats=stats, budget=budget), existing=[model])
    copied = 0 if memory_format == torch.contiguous_format else 4 * 32 * 32 * 9
    assert report.added < copied + 12 * (8 + 4) * 32 * 9 + 32 * 1024


def test_micro_batches_and_statistics_make_the_same_choice():
    model, x = Classifier(), images(12)
    expected = fps.select(model, [x], budget=fps.Global(0.05))
    assert fps.select(model, [x], micro_batch=5, budget=fps.Global(0.05)).overlap(expected) == 1.0
    stats = fps.calibrate(model, list(x.split(3)))
    assert fps.select(model, stats=stats, budget=fps.Global(0.05)).overlap(expected) == 1.0


def test_roles():
    model, data = Classifier(), [images()]
    selection = fps.select(model, data)
    assert set(selection.dense) == {"embed.bias", "hidden.bias", "head.weight", "head.bias"}  # not the norm's bias
    assert selection.skipped == {
        "head.weight": "trained whole",
        "position": "it reached add(), and was never the weight of F.linear, F.conv2d, torch.addmm, F.conv_transpose2d, "
        "torch.matmul or F.grouped_mm",
    }
    assert list(fps.select(model, data, include="hidden*")) == ["hidden.weight"]
    assert list(fps.select(model, data, include=["out*", "embed*"])) == ["embed.weight", "out.weight"]
    excluded = fps.select(model, data, exclude=("embed*", "head*"))
    assert list(excluded) == ["hidden.weight", "out.weight"]
    assert set(excluded.dense) == {"hidden.bias"}
    assert fps.select(model, data, dense=()).dense == ()
    assert "head.weight" in fps.select(model, data, dense=())
    assert "head.weight" in fps.select(model, data, include=["head.weight", "out*"])


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, nn.Sequential], ids=lambda wrap: wrap.__name__)
def test_roles_in_wrapped_models(wrap):
    model, data = Classifier(), [images()]
    expected = fps.select(model, data)
    (prefix,) = {name.split(".")[0] for name, _ in wrap(model).named_parameters()}
    selection = fps.select(wrap(model), data)
    assert list(selection) == [f"{prefix}.{name}" for name in expected]
    assert set(selection.dense) == {f"{prefix}.{name}" for name in expected.dense}


def test_data_free_scorers_take_one_batch():
    batches = iter([images(), images()])
    fps.select(Classifier(), batches, scorer=fps.Magnitude())
    assert len(list(batches)) == 1


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-128, 127, (4, 4), dtype=torch.int8), requires_grad=False)
        self.plain = nn.Linear(4, 4)

    def forward(self, x):
        return self.plain(x @ self.codes.float())


def test_bad_input():
    model, data = Classifier(), [images()]
    for arguments, error, match in (
        ({}, ValueError, "give either data or stats"),
        ({"data": data, "stats": fps.calibrate(model, data)}, ValueError, "not both"),
        ({"stats": fps.calibrate(model, data, ord=2)}, ValueError, r"stats has ord=2.0, but FPS\(\) needs ord=1"),
        ({"stats": fps.calibrate(nn.Linear(8, 3), data)}, ValueError, "stats are of another model"),
        ({"stats": {}}, TypeError, "stats must be ActivationStats, as from fps.calibrate"),
        ({"data": data, "budget": 0.01}, TypeError, "budget must be PerNeuron, PerTensor, LikeLoRA or Global, got 0.01"),
        ({"data": data, "scorer": "fps"}, TypeError, "scorer must be a scorer"),
        (
            {"data": data, "include": "nothing*"},
            ValueError,
            r"include pattern 'nothing\*' matches none of the matrix weights",
        ),
        ({"data": data, "exclude": "nothing*"}, ValueError, "exclude pattern"),
        ({"data": data, "dense": "nothing*"}, ValueError, "dense pattern"),
        ({"data": data, "dense": "head*", "exclude": "head.bias"}, ValueError, "head.bias matches both dense and exclude"),
        ({"data": data, "include": [3]}, TypeError, "include must be glob patterns, got 3"),
        ({"data": data, "exclude": "*"}, ValueError, "no weight is left to choose from"),
    ):
        with pytest.raises(error, match=match):
            fps.select(model, **arguments)
    for make, match in (
        (lambda: fps.PerNeuron(0), "k must be at least 1, got 0"),
        (lambda: fps.PerTensor(0.0), r"density must lie in \(0, 1\], got 0.0"),
        (lambda: fps.Global(1.5), r"density must lie in \(0, 1\], got 1.5"),
        (lambda: fps.Global(float("nan")), "density must lie in"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    for make, match in (
        (lambda: fps.PerNeuron(1.5), "k must be an integer, got 1.5"),
        (lambda: fps.PerNeuron("3"), "k must be an integer, got '3'"),
        (lambda: fps.PerTensor("1%"), "density must be a number, got '1%'"),
        (lambda: fps.Global(None), "density must be a number, got None"),
    ):
        with pytest.raises(TypeError, match=match):
            make()


@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerTensor(0.01), fps.Global(0.01)], ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_layer(bad, budget):
    model = Classifier()
    with torch.no_grad():
        model.out.weight[3, 7] = bad
        model.head.weight.zero_()  # what follows the bad weight is finite, so that only the weight itself can tell
    stats = fps.calibrate(Classifier(), [images()])
    with pytest.raises(ValueError, match="the scores of out.weight contain NaN or Inf"):
        fps.select(model, stats=stats, budget=budget)


def test_more_entries_than_int32_can_count():
    with pytest.raises(ValueError, match=r"k=2048 for the 1048576 rows of w is more than 2\*\*31 - 1 entries"):
        fps.PerNeuron(2048).check("w", MatrixLayout((2**20, 4096)))


def test_integer_weights():
    model, data = Quantised(), [torch.randn(2, 4)]
    selection = fps.select(model, data)
    assert selection.skipped["codes"] == "its dtype is torch.int8, not float32, bfloat16 or float16"
    with pytest.raises(TypeError, match="codes cannot be tuned: its dtype is torch.int8"):
        fps.select(model, data, include="codes")


class Computed(torch.Tensor):
    """A tensor without memory of its own, as those of quantisation libraries: int8 codes that pose as float32."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        return func(*[a.codes.float() if isinstance(a, cls) else a for a in args], **(kwargs or {}))


def test_weights_that_are_no_plain_tensors():
    model = Classifier()
    model.hidden.weight = nn.Parameter(Computed(torch.ones(20, 12, dtype=torch.int8)), requires_grad=False)
    model.graph = nn.Parameter(torch.eye(3).to_sparse())
    selection = fps.select(model, [images()])
    assert selection.skipped["hidden.weight"] == "it is a Computed, not a plain tensor"
    assert selection.skipped["graph"] == "its layout is torch.sparse_coo, not strided"
    with pytest.raises(TypeError, match="hidden.weight cannot be tuned: it is a Computed"):
        fps.select(model, [images()], include="hidden.weight")


@pytest.mark.parametrize("scorer", [fps.FPS(), fps.Random(0)], ids=repr)
@pytest.mark.parametrize("budget", [fps.PerNeuron(1), fps.PerTensor(0.1), fps.Global(0.1)], ids=repr)
def test_weights_without_entries(scorer, budget):
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4))
    selection = fps.select(model, [torch.randn(3, 4)], scorer=scorer, budget=budget)
    assert list(selection) == ["2.weight"]
    assert selection.skipped == {"0.weight": "it has no entries", "1.weight": "it has no entries"}


def test_models_without_a_matrix():
    with pytest.raises(ValueError, match="no weight is left to choose from"):
        fps.select(nn.LayerNorm(4), [torch.randn(2, 4)])


def test_nothing_is_changed_by_a_failed_selection():
    model = Classifier().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
    state["out.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="that reach head.weight contain NaN"):
        fps.select(model, [labelled()])
    assert model.training
    assert all(torch.equal(v.nan_to_num(7), state[k].nan_to_num(7)) for k, v in model.state_dict().items())
