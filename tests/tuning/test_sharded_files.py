"""What a sharded model's tuner saves is what that of one process saves, and any number of processes go on from it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fps_kernels as fps
from tests.support.groups import in_two_processes, join, leave
from tests.support.sharding import batches, largest_difference, mixture, shard, whole
from tests.tuning.test_sharded import alone, chosen, go_on, masked, together


def saving() -> None:
    rank, _ = join()
    folder = os.environ["FPS_TEST_FOLDER"]
    selection = chosen()
    (one, tuner, _), (model, pieces, optimizer) = alone(masked, selection), together(masked, selection)
    fps.save_delta(pieces, f"{folder}/many.safetensors")
    if rank == 0:
        fps.save_delta(tuner, f"{folder}/one.safetensors")
    dist.barrier()
    many, single = fps.load_delta(f"{folder}/many.safetensors"), fps.load_delta(f"{folder}/one.safetensors")
    assert many.base == single.base
    for name in single.values:
        assert torch.equal(many.values[name], single.values[name])
        assert torch.equal(many.selection[name].columns, single.selection[name].columns)
    for name in single.dense:
        assert torch.equal(many.dense[name], single.dense[name])

    base = mixture()
    many.apply_(base)
    assert largest_difference(base, one) == 0
    cut = shard(mixture())
    before = whole(cut)
    single.apply_(cut)
    assert largest_difference(cut, one) == 0
    single.revert_(cut)
    assert all(torch.equal(p, before[name]) for name, p in whole(cut).items())

    # Another run goes on from a delta and a state, on as many processes or on one.
    state = optimizer.state_dict()
    resumed, whole_one = shard(mixture()), mixture()
    tuners = []
    for other in (resumed, whole_one):
        delta = fps.load_delta(f"{folder}/many.safetensors")
        delta.apply_(other)
        tuners.append(fps.attach(other, delta.selection))
        tuners[-1].load_state_dict(delta.values)
    with pytest.raises(ValueError, match="stem.weight is attached"):
        single.apply_(resumed)
    with pytest.raises(ValueError, match=r"stem.weight has \[1\] values, not \[24\]"):
        tuners[0].load_state_dict({name: torch.zeros(1) for name in tuners[0].compact})
    made, made_alone = masked(tuners[0]), masked(tuners[1])
    made.load_state_dict(state)
    made_alone.load_state_dict(state)
    for of, number in ((resumed, made), (model, optimizer)):
        go_on(of, number)
    size = dist.get_world_size()
    for x, y in batches():
        made_alone.zero_grad()
        for part in range(size):
            (F.cross_entropy(whole_one(x[part::size]), y[part::size]) / size).backward()
        made_alone.step()
    assert largest_difference(resumed, model) == 0
    assert largest_difference(resumed, whole_one) == 0

    # torch's own checkpoints
    weights, states = get_state_dict(model, optimizer)
    assert not any("_selected" in name for name in weights)
    content = {"model": weights, "optimizer": states, "values": {n: p.detach() for n, p in pieces.compact.items()}}
    save(content, checkpoint_id=f"{folder}/checkpoint")
    other = shard(mixture())
    tuner = fps.attach(other, selection)
    restored = masked(tuner)
    weights, states = get_state_dict(other, restored)
    content = {"model": weights, "optimizer": states, "values": {n: p.detach() for n, p in tuner.compact.items()}}
    load(content, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(other, restored, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    assert largest_difference(other, model) == 0
    for of, number in ((other, restored), (model, optimizer)):
        go_on(of, number)
    assert largest_difference(other, model) == 0
    leave()


def test_what_is_saved_is_what_one_process_saves(tmp_path):
    in_two_processes(saving, tmp_path)


def the_page() -> None:
    """What docs/how-to/distributed.md shows of sharded models."""
    rank, size = join()
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[2].partition("```")[0], scope)
    os.chdir(os.environ["FPS_TEST_FOLDER"])
    loader = [(x[rank::size], y[rank::size]) for x, y in batches()]
    model, other, base = mixture(), mixture(), mixture()
    tuner, optimizer = scope["train"](model, loader, 2)
    scope["go_on"](other, "task.safetensors", optimizer.state_dict())
    fps.load_delta("task.safetensors").apply_(base)
    tuner.detach()
    assert largest_difference(model, other) == largest_difference(model, base) == 0
    leave()


def test_the_page_about_sharded_models(tmp_path):
    in_two_processes(the_page, tmp_path)
