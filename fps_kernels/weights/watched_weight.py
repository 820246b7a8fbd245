"""Weights that tell who watches them of every function that they are given to; any other function costs nothing.

A weight becomes a :class:`_WatchedWeight` in place, by its class, as long as somebody watches, so that whatever refers to
it finds it. What a ``TorchFunctionMode`` sees beside that are tensors in the memory of a weight that were there before:
:func:`can_be_watched` tells whether there are any.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.weights.attention import opened_attention
from fps_kernels.weights.uses import Uses, memory_of

Taker = Callable[[Tensor], bool]

_OPEN_ATTENTION = opened_attention().forward
_LINEAR = F.linear
_without_overrides = torch._C.DisableTorchFunctionSubclass
_transforms_are_active = torch._C._are_functorch_transforms_active


class _WatchedWeight(nn.Parameter):
    """A parameter while it is watched."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _LINEAR and len(args) == 3:  # what nearly all calls are; the general way comes to the same
            x, weight, bias = args
            take = _mine.takers.get(id(weight))
            plain = type(x) is Tensor and (bias is None or type(bias) is nn.Parameter)
            if take is not None and plain and not _transforms_are_active() and take(x):
                with _without_overrides():
                    return func(x, weight, bias)
        return _watched(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.__class__ = nn.Parameter
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _without_overrides():  # its data is plain, then
            return super().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _WatchedPart(Tensor):
    """A view of a watched weight."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _watched(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _without_overrides():
            return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _without_overrides():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


class WatchedWeights:
    """The weights of a model, watched inside the ``with`` block by the thread that entered it.

    Args:
        parameters: plain parameters that :func:`can_be_watched`, by name.
        uses: is told of every function that they, and views of them, are given to.
        takers: of :class:`~fps_kernels.weights.watching.WeightInterception`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], uses: Uses, takers: Mapping[str, Taker]) -> None:
        self.uses = uses
        self.thread = 0
        self._weights = list(parameters.values())
        self._parts: list[weakref.ref[Tensor]] = []
        self._takers = {id(parameters[name]): take for name, take in takers.items() if name in parameters}

    def __enter__(self) -> None:
        self.thread = threading.get_ident()
        for weight in self._weights:
            _WATCHERS[id(weight)] = self
            weight.__class__ = _WatchedWeight
        _mine.takers.update(self._takers)

    def __exit__(self, *_: object) -> None:
        for weight in self._weights:
            if type(weight) is _WatchedWeight:
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
            _WATCHERS.pop(id(weight), None)
            _mine.takers.pop(id(weight), None)
        parts, self._parts = self._parts, []
        for reference in parts:
            if (part := reference()) is not None:
                part.__class__ = Tensor
                _WATCHERS.pop(id(part), None)

    def adopt(self, result: Any, weights: Iterable[Tensor]) -> None:
        """Watch what a function gave back, where it is a view of a weight that it was given."""
        if isinstance(result, list | tuple):
            for item in result:
                self.adopt(item, weights)
        elif type(result) is Tensor and (
            ((memory := memory_of(result)) in {memory_of(w) for w in weights} and memory is not None)
            or self.uses.table.is_copy(result)
        ):
            result.__class__ = _WatchedPart
            key = id(result)
            _WATCHERS[key] = self
            self._parts.append(weakref.ref(result, lambda _: _WATCHERS.pop(key, None)))


_WATCHERS: dict[int, WatchedWeights] = {}  # by the id of a weight, or of a view of one


class _Mine(threading.local):
    """What takes inputs of the weights that this thread watches, by their ids."""

    def __init__(self) -> None:
        self.takers: dict[int, Taker] = {}


_mine = _Mine()


def can_be_watched(parameters: Iterable[Tensor]) -> bool:
    """Whether whatever reaches a function of these parameters, does so as the parameter or as a view made meanwhile.

    That is so of plain parameters whose memory nothing else refers to.
    """
    in_use = torch._C._storage_Use_Count
    # A tensor's storage, and the object that asks for it.
    return all(type(p) is nn.Parameter and in_use(p.untyped_storage()._cdata) == 2 for p in parameters)


def _watched_in(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is _WatchedWeight or kind is _WatchedPart:
            found.append(value)
        elif kind is list or kind is tuple:
            found += _watched_in(value)
    return found


def _watched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    weights = _watched_in((*args, *kwargs.values()))
    watcher = _WATCHERS.get(id(weights[0])) if weights else None
    if watcher is None or watcher.thread != threading.get_ident():
        with _without_overrides():
            return func(*args, **kwargs)
    if func is F.multi_head_attention_forward:
        return _OPEN_ATTENTION(*args, **kwargs)  # arrives here again, at each of its projections
    with _without_overrides():
        result = watcher.uses.run(func, args, kwargs)
        watcher.adopt(result, weights)
    return result
