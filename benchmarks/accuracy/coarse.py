"""An idea that was tried: what GELUs keep of their inputs in 4 bits, everything else in 8."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fps_kernels.keeping import kept
from fps_kernels.keeping.packed import Groups, Pass


class _FourBits(Groups):
    BITS = 4


class _Choosing:
    """Stands for :class:`Groups` in the hooks; tells GELUs' inputs by the module whose forward pass is under way."""

    def __init__(self) -> None:
        self.in_gelu = False

    def __call__(self, t: torch.Tensor, send: Pass | None, back: Pass | None) -> Groups:
        return (_FourBits if self.in_gelu else Groups)(t, send, back)

    def mark(self, module: nn.Module) -> None:
        """Notice when a GELU runs."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "in_gelu", True))
        module.register_forward_hook(lambda *_: setattr(self, "in_gelu", False), always_call=True)


def with_coarse_gelu(make: Callable[..., Any], model: nn.Module, *args: Any, **options: Any) -> Any:
    """``make(model, ...)`` of a model whose GELUs keep their inputs in 4 bits where others keep theirs in 8.

    Raises:
        ValueError: there is no GELU.
    """
    gelus = [m for m in model.modules() if isinstance(m, nn.GELU)]
    if not gelus:
        raise ValueError("the model has no torch.nn.GELU whose input could be kept in 4 bits")
    choosing = _Choosing()
    for m in gelus:
        choosing.mark(m)
    kept.Groups = choosing  # type: ignore[assignment, misc]  # a trial: the library offers no such switch
    return make(model, *args, **options)


def coarse(make: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`with_coarse_gelu` of one way of tuning."""
    return partial(with_coarse_gelu, make)
