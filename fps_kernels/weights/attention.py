"""Attention, opened: what ``F.multi_head_attention_forward`` calls can be seen, and replaced."""

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def opened_attention(
    linear: Callable[..., Tensor] = F.linear, packed: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` without its own check for overrides, so that its projections arrive where any
    other linear map does.

    Args:
        linear: what its projections call.
        packed: ``packed(torchs_own, q, k, v, w, b)`` makes the three projections of one weight, instead of torch's function.
    """
    scope = dict(F.multi_head_attention_forward.__globals__)
    scope |= {"has_torch_function": lambda _: False, "linear": linear}

    def opened(closed: Any) -> Callable[..., Any]:
        function = types.FunctionType(closed.__code__, scope, closed.__name__, closed.__defaults__, closed.__closure__)
        function.__kwdefaults__ = closed.__kwdefaults__
        return function

    torchs_own = opened(scope["_in_projection_packed"])
    scope["_in_projection"] = opened(scope["_in_projection"])
    if packed is None:
        scope["_in_projection_packed"] = torchs_own
    else:
        # A function of plain arguments: a compiler follows it, where it would not follow a partial one.
        def projections(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
            return packed(torchs_own, q, k, v, w, b)

        scope["_in_projection_packed"] = projections
    return opened(F.multi_head_attention_forward)
