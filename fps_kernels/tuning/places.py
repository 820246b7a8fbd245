"""Where parameters are in their model: a step that moves one that the model has no more would be lost in silence."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Place = tuple[dict[str, Any], str, Any]  # the children or parameters of a module, a name among them, and what has that name

# The models of parameters that were handed out by masked_parameters(), and their names there.
_MODELS: "WeakIdKeyDictionary" = WeakIdKeyDictionary()


def find_places(model: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[list[Place], list[str]]:
    """A way to each parameter, step by step, and the names of those that the model has not."""
    missing = {id(p): name for name, p in parameters.items()}
    places: dict[tuple[int, str], Place] = {}
    rest: list[tuple[nn.Module, tuple[Place, ...]]] = [(model, ())]
    known = {id(model)}
    while rest:
        module, path = rest.pop()
        for leaf, p in module._parameters.items():
            if missing.pop(id(p), None) is not None:
                way = (*path, (module._parameters, leaf, p))
                places.update({(id(siblings), key): (siblings, key, one) for siblings, key, one in way})
        for key, child in module._modules.items():
            if child is not None and id(child) not in known:
                known.add(id(child))
                rest.append((child, (*path, (module._modules, key, child))))
    return list(places.values()), list(missing.values())


def all_there(places: Iterable[Place]) -> bool:
    """Whether each step of the way is what it was."""
    return all(siblings.get(key) is one for siblings, key, one in places)


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
