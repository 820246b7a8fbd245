"""Weights that are of a class of their own while they are watched, and of their own again afterwards."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.weights.uses import WeightUse
from fps_kernels.weights.watched_weight import can_be_watched
from fps_kernels.weights.watching import WeightInterception


def plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def test_copies_and_files_made_meanwhile_are_plain():
    model, made = nn.Linear(3, 3), []
    with WeightInterception(dict(model.named_parameters()), lambda use: None), torch.no_grad():
        assert not plain(model.weight)
        made += [copy.deepcopy(model).weight, pickle.loads(pickle.dumps(model.weight)), copy.copy(model.weight)]
        made += [copy.deepcopy(model.weight[:2]), pickle.loads(pickle.dumps(model.weight[:2])), model.weight * 2]
        kept = model.weight[:2]
        assert isinstance(model.weight, nn.Parameter)
        assert not isinstance(kept, nn.Parameter)
    assert all(plain(p) for p in (*made, kept, model.weight, model.bias))
    assert [p.requires_grad for p in made[:3]] == [True] * 3
    assert torch.equal(made[3], kept)


def test_what_somebody_else_has_a_view_of_is_found_by_its_memory():
    """A view that was made before is no weight to torch: only a look at every function finds it."""
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3)
    assert can_be_watched([weight])
    rows = weight.detach()[1:3]
    assert not can_be_watched([weight])
    assert not can_be_watched([nn.Parameter(weight.detach())])
    uses: list[WeightUse] = []
    with WeightInterception({"w": weight}, uses.append):
        F.linear(x, rows)
        assert plain(weight)
    assert [use.rows for use in uses] == [(1, 3)]
    del rows
    with WeightInterception({"w": weight}, uses.append):
        assert not plain(weight)
        F.linear(x, weight.data)
    assert [use.rows for use in uses] == [(1, 3), (0, 4)]


def test_a_view_that_is_kept_is_found_in_the_next_pass():
    class Keeps(nn.Linear):
        kept: Tensor | None = None

        def forward(self, x):
            self.kept = self.weight.detach() if self.kept is None else self.kept
            return F.linear(x, self.kept)

    model, uses = Keeps(3, 4), []
    watch = WeightInterception({"weight": model.weight}, uses.append)
    for _ in range(2):
        with watch:
            model(torch.randn(2, 3))
    assert [use.name for use in uses] == ["weight"] * 2


def test_other_threads_are_not_watched():
    weight, x, uses = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3), []
    taken: list[Tensor] = []

    def take(given: Tensor) -> bool:
        taken.append(given)
        return True

    with WeightInterception({"w": weight}, uses.append, takers={"w": take}):
        thread = threading.Thread(target=lambda: (F.linear(x, weight, None), F.linear(x, weight[:2])))
        thread.start()
        thread.join()
        assert (taken, uses) == ([], [])
        F.linear(x, weight, None)
    assert len(taken) == 1


def test_a_taker_is_given_plain_inputs_of_the_whole_weight():
    weight, x, uses = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3), []
    taken: list[Tensor] = []

    def take(given: Tensor) -> bool:
        taken.append(given)
        return len(taken) == 1

    query = nn.Parameter(torch.randn(1, 3))
    with WeightInterception({"w": weight}, uses.append, takers={"w": take}), torch.no_grad():
        F.linear(x, weight, None)
        F.linear(x, weight, None)  # is not taken
        F.linear(query, weight, None)  # no plain tensor
        torch.vmap(lambda row: F.linear(row, weight, None))(x)
        F.linear(x, weight[:2], None)
    assert [t is x for t in taken] == [True, True]
    assert [use.rows for use in uses] == [(0, 4), (0, 4), (0, 2)]


def test_an_exception_leaves_plain_weights():
    model = nn.Linear(3, 3)
    with pytest.raises(ZeroDivisionError), WeightInterception(dict(model.named_parameters()), lambda use: None):
        part = model.weight.t()
        raise ZeroDivisionError
    assert all(plain(p) for p in (model.weight, model.bias, part))
