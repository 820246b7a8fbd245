"""Where parameters are in their model: a step that moves one that the model has no more would be lost in silence."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# The children or parameters of a module, a name among them, and what has that name: of a sharded parameter, which of the two
# that it has depends on whether its module runs, a tuple of both.
Place = tuple[dict[str, Any], str, Any]

# The models of parameters that were handed out by masked_parameters(), and their names there.
_MODELS: "WeakIdKeyDictionary" = WeakIdKeyDictionary()


def find_places(
    model: nn.Module, parameters: Mapping[str, Tensor], twins: Mapping[Tensor, Tensor] | None = None
) -> tuple[list[Place], list[str]]:
    """A way to each parameter, step by step, and the names of those that the model has not.

    Args:
        model: where to look.
        parameters: by name.
        twins: of sharded ones, what stands in for them while their module runs.
    """
    twins = twins or {}
    pairs = {id(one): (p, twins[p]) for p in parameters.values() if p in twins for one in (p, twins[p])}
    missing = {id(p): name for name, p in parameters.items()}
    missing |= {id(twins[p]): name for name, p in parameters.items() if p in twins}
    places: dict[tuple[int, str], Place] = {}
    rest: list[tuple[nn.Module, tuple[Place, ...]]] = [(model, ())]
    known = {id(model)}
    while rest:
        module, path = rest.pop()
        for leaf, p in module._parameters.items():
            if missing.pop(id(p), None) is not None:
                one = pairs.get(id(p))
                for twin in one or ():
                    missing.pop(id(twin), None)
                way = (*path, (module._parameters, leaf, p if one is None else one))
                places.update({(id(siblings), key): (siblings, key, one) for siblings, key, one in way})
        for key, child in module._modules.items():
            if child is not None and id(child) not in known:
                known.add(id(child))
                rest.append((child, (*path, (module._modules, key, child))))
    return list(places.values()), list(dict.fromkeys(missing.values()))


def all_there(places: Iterable[Place]) -> bool:
    """Whether each step of the way is what it was."""
    return all(siblings.get(key) is one or _one_of(siblings.get(key), one) for siblings, key, one in places)


def _one_of(found: Any, pair: Any) -> bool:
    return type(pair) is tuple and any(found is one for one in pair)


def remember(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Note whose parameters these are."""
    for name, p in parameters.items():
        _MODELS[p] = weakref.ref(model), name


def remembered_places(parameters: Iterable[Tensor]) -> list[Place]:
    """Where parameters are whose model was noted.

    Raises:
        ValueError: it has not all of them any more. With the name of one, and what to do.
    """
    models: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for p in parameters:
        noted, name = _MODELS.get(p, (None, ""))
        model = None if noted is None else noted()
        if model is not None:
            models.setdefault(id(model), (model, {}))[1][name] = p
    places: list[Place] = []
    for model, wanted in models.values():
        found, missing = find_places(model, wanted)
        if missing:
            raise ValueError(
                f"{missing[0]} was replaced since masked_parameters(), by itself or with its module: a step would move what "
                "the model has no more. Make the optimizer after whatever replaces parameters (a new head, resized "
                "embeddings, sharding)"
            )
        places += found
    return places
