"""State of an optimizer whose parameters are sharded: saved whole, whatever the number of processes, and loaded in parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fps_kernels.selection import WeightSelection
from fps_kernels.tuning.compact_values import entries_of
from fps_kernels.tuning.sharded_entries import ShardedEntries
from fps_kernels.weights.exchange import Division, gathered
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.shards import Shard, local_part

_COMPACT = ("exp_avg", "exp_avg_sq", "master")


def division_of(parameter: Any) -> Division | None:
    """How a parameter's numbers are divided over processes; ``None`` where each has all."""
    entries = entries_of(parameter)
    if isinstance(entries, ShardedEntries):
        return entries.division
    if local_part(parameter) is parameter:
        return None
    return Division.of_all(Shard.of("a parameter", torch.nn.Module(), "", parameter))


def chosen_of(parameter: Tensor, here: WeightSelection) -> WeightSelection:
    """The chosen entries of a parameter on all processes, of those on this one."""
    entries = entries_of(parameter)
    if entries is not None:
        return entries.selection
    return here if local_part(parameter) is parameter else WeightSelection.whole(MatrixLayout(tuple(parameter.shape)))


def whole_state(state: Mapping[int, dict[str, Any]], parameters: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
    """An optimizer's state by the numbers of its parameters, with what all processes, which ask together, have of each."""
    made = {i: dict(of) for i, of in state.items()}
    places = [(i, key) for i, of in made.items() for key in _COMPACT if key in of]
    divisions = {i: division_of(parameters[i]) for i in {i for i, _ in places}}
    divided = [(i, key, division) for i, key in places if (division := divisions[i]) is not None]
    wholes = gathered([division for _, _, division in divided], [made[i][key] for i, key, _ in divided])
    for (i, key, _), whole in zip(divided, wholes, strict=True):
        made[i][key] = whole
    return made


def own_state(state: Mapping[Any, Any], ids: Sequence[Any], parameters: Sequence[Tensor]) -> dict[Any, Any]:
    """The reverse: what this process needs of it."""
    made = {i: dict(of) for i, of in state.items()}
    for i, p in zip(ids, parameters, strict=True):
        division = division_of(p)
        if division is not None and i in made:
            made[i] |= {key: division.own(made[i][key]) for key in _COMPACT if key in made[i]}
    return made
