"""Where new tensors lie by default is the user's affair: nothing of ours depends on it."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import fps_kernels as fps
from tests.support.models import Classifier, labelled
from tests.support.pretended_gpu import pretended_gpu

BUDGETS = [fps.PerNeuron(2), fps.PerTensor(0.1), fps.LikeLoRA(1), fps.Global(0.6), fps.Global(0.1)]
SCORERS = [fps.FPS(), fps.Wanda(), fps.Magnitude(), fps.Random(seed=0)]


def same(first: fps.Selection, second: fps.Selection) -> bool:
    return first.weights.keys() == second.weights.keys() and all(
        torch.equal(a.columns, second[name].columns) and torch.equal(a.row_offsets, second[name].row_offsets)
        for name, a in first.items()
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_choices_are_the_same(budget, scorer, layout):
    model, (x, _) = Classifier().to(memory_format=layout), labelled()
    expected = fps.select(model, [x], budget=budget, scorer=scorer)
    with torch.device("meta"):
        found = fps.select(model, [x], budget=budget, scorer=scorer)
    assert same(found, expected)


def test_training_and_deltas_are_the_same(tmp_path):
    """Some steps, a state that is loaded, deltas that are saved, merged and applied."""
    base, batch = Classifier(), labelled()
    base.embed.to(memory_format=torch.channels_last)
    ends = []
    for number, device in enumerate((nullcontext(), torch.device("meta"))):
        model = copy.deepcopy(base)
        with device:
            selection = fps.select(model, [batch[0]], budget=fps.PerTensor(0.1))
            tuner = fps.attach(model, selection)
            optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
            for step in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.5
                if step == 1:
                    file = io.BytesIO()
                    torch.save(optimizer.state_dict(), file)
                    file.seek(0)
                    optimizer.load_state_dict(torch.load(file))
            path = tmp_path / f"{number}.safetensors"
            fps.save_delta(tuner, path, buffers=True)
            tuner.detach()
            delta = fps.load_delta(path)
            again = copy.deepcopy(base)
            other = fps.load_delta(path)
            for values in other.values.values():
                values[::2] += 1
            merged, conflicts = fps.merge([delta, other], on_conflict="mean")
            assert conflicts
            merged.apply_(again)
        ends.append({**model.state_dict(), **{f"merged {n}": p for n, p in again.state_dict().items()}})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_gradients_are_chosen_from_in_the_same_way():
    model, (x, y) = Classifier(), labelled()
    expected = fps.gps_select(model, [(x, y)], loss="cross_entropy")
    with torch.device("meta"):
        assert same(fps.gps_select(model, [(x, y)], loss="cross_entropy"), expected)
        fps.gps_select(model, [(x, y)], views=fps.gps.random_views)


def test_a_gpu_may_be_the_default():
    """As on many a machine: nothing that the host works with goes there, and nothing waits for it."""
    with pretended_gpu() as gpu, torch.device("cuda"):
        model, (x, y) = Classifier(), (torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64))
        for budget in BUDGETS:
            for scorer in SCORERS:
                with gpu.waiting(2):
                    selection = fps.select(model, [x], budget=budget, scorer=scorer, progress=False)
        assert selection.nnz
        with gpu.waiting(None):
            chosen = fps.select(model, [x], progress=False, scorer=fps.Random(0))
        with gpu.waiting(2):
            tuner = fps.attach(model, chosen)
        with gpu.waiting(1):
            optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
        with gpu.waiting(0):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.5
