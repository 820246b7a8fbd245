"""Weights that accelerate keeps in main memory or on disk and brings in while their module runs.

A module's parameters are then empty stand-ins on the meta device, which are replaced by others at each forward pass: they
are known by the module that owns them and by their name in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
