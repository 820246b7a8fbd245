"""Choosing from a model that ``fully_shard`` has cut: the choice of one process, on two and on three."""

import itertools
import warnings

import pytest
import torch

import fps_kernels as fps
from tests.support.groups import in_processes, in_two_processes, join, leave
from tests.support.sharding import batches, mixture, shard

BUDGETS = (
    fps.PerNeuron(2),
    fps.PerNeuron(30),  # more than some weights have columns
    fps.PerTensor(0.03),
    fps.LikeLoRA(1),
    fps.Global(0.001),  # fewer entries than processes times weights
    fps.Global(0.5),
    fps.Global(1.0),
)


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of few values, so that scores are tied, many at zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 4).round())
    return model


def choices() -> None:
    rank, size = join()
    x = batches()[0][0]
    stats = fps.calibrate(mixture(), [x], progress=False)
    sharded = shard(mixture())
    same = fps.calibrate(sharded, [x], progress=False)
    assert list(same) == list(stats)
    for name in stats:
        assert torch.equal(same[name].norm, stats[name].norm), name
    warnings.simplefilter("ignore")  # budgets that do not fit all weights are said
    for change, scorers in ((lambda model: model, (fps.FPS(), fps.Random(3))), (rounded, (fps.FPS(), fps.Magnitude()))):
        whole, cut = change(mixture()), shard(change(mixture()))
        for scorer, budget in itertools.product(scorers, BUDGETS):
            options = {"stats": stats, "scorer": scorer, "budget": budget}
            alone = fps.select(whole, **options, process_group=False)
            together = fps.select(cut, **options)
            assert (list(together), together.dense, together.skipped) == (list(alone), alone.dense, alone.skipped)
            for name, w in alone.items():
                assert torch.equal(together[name].row_offsets, w.row_offsets), (name, scorer, budget)
                assert torch.equal(together[name].columns, w.columns), (name, scorer, budget)
    together = fps.select(sharded, [x[rank::size]], progress=False)  # each its part of the data
    assert together.overlap(fps.select(mixture(), [x], progress=False, process_group=False)) > 0.99
    leave()


@pytest.mark.parametrize("count", [2, 3])
def test_the_choice_of_one_process(count, tmp_path):
    in_processes(choices, count, tmp_path)


def errors() -> None:
    rank, _ = join()
    x = batches()[0][0]
    stats = fps.calibrate(mixture(), [x], progress=False)
    for budget in (fps.PerNeuron(1), fps.Global(0.1)):
        broken = mixture()
        with torch.no_grad():
            broken.blocks[0].up.weight[3, 3] = float("nan")  # in the rows of the first process: both say so
        with pytest.raises(ValueError, match="the scores of blocks.0.up.weight contain NaN or Inf: check the weight"):
            fps.select(shard(broken), stats=stats, budget=budget)
    with pytest.raises(ValueError, match="process_group=False, but the model is sharded"):
        fps.select(shard(mixture()), [x], process_group=False)
    bad = x.clone()
    if rank:
        bad[0] = float("inf")
    with pytest.raises(ValueError, match="contain NaN or Inf"):
        fps.select(shard(mixture()), [bad], progress=False)
    model = mixture()
    left_out = model.blocks[0].up.weight
    selection = fps.select(shard(model, ignored_params={left_out}), [x], progress=False)
    assert selection.skipped["blocks.0.up.weight"].startswith("it is not sharded, while others are")
    leave()


def test_errors_on_every_process(tmp_path):
    in_two_processes(errors, tmp_path)
