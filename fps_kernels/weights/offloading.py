"""Weights that accelerate keeps in main memory or on disk and brings in while their module runs.

A module's parameters are then empty stand-ins on the meta device, which are replaced by others at each forward pass: they
are known by the module that owns them and by their name in it. Where several passes are under way at once, what one has
brought in is shared (:class:`Presence`).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TRIM: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def _hook(module: nn.Module) -> Any:
    """The hook that brings in a module's own parameters, if it has one; several hooks come as one that holds them."""
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own parameters are brought in when it runs."""
    return _hook(module) is not None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module runs; ``None`` of any other."""
    hook = _hook(module)
    return None if hook is None else torch.device(hook.execution_device)


@contextmanager
def brought_in(module: nn.Module, leaf: str) -> Iterator[Tensor]:
    """A parameter of an offloaded module with its values, on the device where the module runs."""
    hook = _hook(module)
    with torch.no_grad():
        hook.pre_forward(module)
        try:
            yield module.get_parameter(leaf).detach()
        finally:
            hook.post_forward(module, None)


class _SharedHook:
    """In place of the hook of a module: its parameters stay as long as a pass is inside of it, or they are held.

    Attributes:
        held: whether they stay with no pass inside.
    """

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.held = False
        self._module, self._hook = module, hook
        self._inside, self._present = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hook, name)

    @contextmanager
    def _moving(self, moves: bool) -> Iterator[None]:
        self._hook.offload = moves  # the rest of what it does, as sending inputs to its device, has to be done each time
        try:
            yield
        finally:
            self._hook.offload = True

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Before the module runs."""
        with self._moving(not self._present):
            found = self._hook.pre_forward(module, *args, **kwargs)
        self._inside, self._present = self._inside + 1, True
        return found

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """After it has run."""
        self._inside -= 1
        self._present = self.held or self._inside > 0
        with self._moving(not self._present):
            return self._hook.post_forward(module, output)

    def release(self, *, whoever_is_inside: bool = False) -> None:
        """Let the parameters go, if no pass is inside."""
        self.held = False
        if whoever_is_inside:
            self._inside = 0
        if self._present and not self._inside:
            self._present = False
            with torch.no_grad():
                self._hook.post_forward(self._module, None)


class Presence:
    """When the weights of an offloaded model are there, for several passes through it that are under way at once.

    Args:
        model: whose modules' parameters are brought in when they run.

    Attributes:
        blocks: the modules that are run by one pass after the other with all of their weights there: the largest with no
            more than an eighth of all, so that one of them is little beside the model, and what passes have computed is
            kept between few of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [module for module in model.modules() if is_offloaded(module)]
        sizes = {module: sum(p.numel() * p.element_size() for p in _brought(module)) for module in self._owners}
        self._inner = {module: [m for m in module.modules() if m in sizes] for module in model.modules()}
        within = {module: sum(sizes[m] for m in inner) for module, inner in self._inner.items()}
        self.blocks = list(dict.fromkeys(_blocks(model, within, within[model] // 8))) or [model]
        self._hooks: dict[nn.Module, _SharedHook] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, what one pass has brought in stays as long as any needs it."""
        found = {module: _hook(module) for module in self._owners}
        self._hooks = {module: _SharedHook(module, hook) for module, hook in found.items()}
        try:
            for module, hook in found.items():
                _replace_hook(module, hook, self._hooks[module])
            yield
        finally:
            for module, hook in found.items():
                self._hooks[module].release(whoever_is_inside=True)
                _replace_hook(module, self._hooks[module], hook)
            self._hooks = {}

    @contextmanager
    def held(self, block: nn.Module) -> Iterator[None]:
        """Inside, what is brought in of a block stays."""
        hooks = [self._hooks[module] for module in self._inner[block]]
        for hook in hooks:
            hook.held = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.release()
            _give_back()


def _give_back() -> None:
    """Let the C library give memory that is free back to the system.

    glibc keeps what lies between blocks that are in use: weights and activations of like sizes, freed in turn, would leave
    it with several times what is ever in use.
    """
    if _TRIM is not None:
        _TRIM(0)


def _brought(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=_hook(module).place_submodules)


def _blocks(module: nn.Module, sizes: dict[nn.Module, int], limit: int) -> Iterator[nn.Module]:
    for child in module.children():
        if not sizes[child]:
            continue
        is_run = type(child).forward is not nn.Module.forward  # lists of modules are not
        if is_run and (sizes[child] <= limit or not any(sizes[inner] for inner in child.children())):
            yield child
        else:
            yield from _blocks(child, sizes, limit)


def _replace_hook(module: Any, hook: Any, other: Any) -> None:
    if module._hf_hook is hook:
        module._hf_hook = other
    else:
        module._hf_hook.hooks = tuple(other if h is hook else h for h in module._hf_hook.hooks)
