"""Several deltas to one base as one."""

import copy

import pytest
import torch
from torch import nn

import fps_kernels as fps


def two_deltas() -> tuple[nn.Module, list]:
    base = nn.Sequential(nn.Linear(4, 3))
    deltas = []
    for columns, shift in (([0, 1], 1.0), ([1, 2], 2.0)):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model[0].weight[:, columns] += shift
        deltas.append(fps.diff(base, model))
    return base, deltas


@pytest.mark.parametrize(("on_conflict", "shift"), [("first", 1.0), ("last", 2.0), ("mean", 1.5)])
def test_merging(on_conflict, shift):
    base, deltas = two_deltas()
    merged, conflicts = fps.merge(deltas, on_conflict)
    assert [(c.name, c.entries) for c in conflicts] == [("0.weight", 3)]
    assert conflicts[0].largest == pytest.approx(1.0, abs=1e-5)
    expected = base[0].weight.detach().clone()
    expected[:, 0] += 1
    expected[:, 1] += shift
    expected[:, 2] += 2
    merged.apply_(base)
    torch.testing.assert_close(base[0].weight.detach(), expected)


def test_merging_what_agrees_or_not():
    _, deltas = two_deltas()
    with pytest.raises(ValueError, match="3 entries of 0.weight have different values"):
        fps.merge(deltas)
    merged, conflicts = fps.merge([deltas[0], deltas[0]])
    assert conflicts == []
    assert torch.equal(merged.values["0.weight"], deltas[0].values["0.weight"])
    with pytest.raises(ValueError, match="no delta"):
        fps.merge([])
    with pytest.raises(ValueError, match="on_conflict must be"):
        fps.merge(deltas, "newest")
    with pytest.raises(ValueError, match="different base models"):
        fps.merge([deltas[0], two_deltas()[1][0]])


def test_merging_whole_parameters():
    base = nn.Linear(3, 2)
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        models[0].weight += 1
        models[1].weight[0, 0] += 5
        models[1].bias += 1
    merged, conflicts = fps.merge([fps.diff(base, m) for m in models], "last")
    assert [c.name for c in conflicts] == ["weight"]
    expected = models[0].weight.detach().clone()
    expected[0, 0] = models[1].weight[0, 0]
    torch.testing.assert_close(merged.dense["weight"], expected)
    torch.testing.assert_close(merged.dense["bias"], models[1].bias.detach())
