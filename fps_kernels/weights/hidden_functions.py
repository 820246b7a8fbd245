"""Functions that torch lets nobody intercept, seen from outside: custom ``autograd.Function``, TorchScript, ``torch.vmap``.

Their arguments never reach a ``__torch_function__``: none of them asks for one. What they were given is seen where torch
looks up what to call: the ``forward`` of a ``Function``, on its class; the call of a scripted function; what ``torch.vmap``
and ``torch.func.grad`` wrap their arguments with. That way it does not matter where a model keeps an ``apply`` that it took
from its class long before.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap
from torch.autograd.function import FunctionMeta

Listener = Callable[[str, Iterable[Any]], None]

_SCRIPTED = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_SCRIPTED_CALLS = {scripted: scripted.__dict__["__call__"] for scripted in _SCRIPTED}
_WRAPPERS = ((vmap, "_add_batch_dim", "torch.vmap()"), (eager_transforms, "_wrap_for_grad", "torch.func.grad()"))
_WRAPPING = {(module, name): getattr(module, name) for module, name, _ in _WRAPPERS}
# Takes the arguments of checkpoint() to recompute with them: they pass through.
_PASSING = frozenset({"torch.utils.checkpoint._NoopSaveInputs"})

_lock = threading.Lock()
_listeners: list[tuple[int, Listener]] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener(label, arguments)`` is told of every call of such a function by this thread.

    Example:
        >>> with listening(lambda label, values: print(label)):
        ...     FusedLinear.apply(x, weight)
        FusedLinear.apply()
    """
    entry = threading.get_ident(), listener
    with _lock:
        if not _listeners:
            _install()
        _listeners.append(entry)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(entry)
            if not _listeners:
                _remove()


def _install() -> None:
    FunctionMeta.__getattribute__ = _attribute_of_function  # type: ignore[method-assign]
    for scripted in _SCRIPTED:
        setattr(scripted, "__call__", _called_script)  # noqa: B010  # a method, to mypy
    for module, name, label in _WRAPPERS:
        setattr(module, name, partial(_wrapped, _WRAPPING[module, name], label))


def _remove() -> None:
    del FunctionMeta.__getattribute__
    for scripted, call in _SCRIPTED_CALLS.items():
        setattr(scripted, "__call__", call)  # noqa: B010
    for (module, name), wrapping in _WRAPPING.items():
        setattr(module, name, wrapping)


def _attribute_of_function(cls: Any, name: str) -> Any:
    found = type.__getattribute__(cls, name)
    if name != "forward" or f"{cls.__module__}.{cls.__qualname__}" in _PASSING:
        return found

    def forward(*args: Any, **kwargs: Any) -> Any:
        _tell(f"{cls.__name__}.apply()", (*args, *kwargs.values()))
        return found(*args, **kwargs)

    return forward


def _called_script(self: Any, *args: Any, **kwargs: Any) -> Any:
    _tell(f"{self.name}(), which is TorchScript", (*args, *kwargs.values()))
    return _SCRIPTED_CALLS[next(kind for kind in _SCRIPTED if isinstance(self, kind))](self, *args, **kwargs)


def _wrapped(wrapping: Callable[..., Any], label: str, *args: Any) -> Any:
    _tell(label, args[:1])
    return wrapping(*args)


def _tell(label: str, values: Iterable[Any]) -> None:
    for thread, listener in tuple(_listeners):
        if thread == threading.get_ident():
            listener(label, values)
