"""Attention, opened: what ``F.multi_head_attention_forward`` calls can be seen, and replaced."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class OpenedAttention(NamedTuple):
    """torch's own functions, without their checks for overrides.

    Attributes:
        forward: ``F.multi_head_attention_forward``.
        packed_projections: makes the three projections of one weight: ``(q, k, v, w, b)``.
    """

    forward: Callable[..., Any]
    packed_projections: Callable[..., Any]


def opened_attention(
    linear: Callable[..., Tensor] = F.linear, packed_projections: Callable[..., Any] | None = None
) -> OpenedAttention:
    """``F.multi_head_attention_forward`` whose projections arrive where any other linear map does.

    Args:
        linear: what its projections call.
        packed_projections: makes the three projections of one weight, instead of torch's function. It must be a function
            of a module: a compiler looks up by name what it saw called, and finds no closure there.
    """
    scope = dict(F.multi_head_attention_forward.__globals__)
    scope |= {"has_torch_function": lambda _: False, "linear": linear}

    def opened(closed: Any) -> Callable[..., Any]:
        function = types.FunctionType(closed.__code__, scope, closed.__name__, closed.__defaults__, closed.__closure__)
        function.__kwdefaults__ = closed.__kwdefaults__
        return function

    torchs_own = opened(scope["_in_projection_packed"])
    scope["_in_projection"] = opened(scope["_in_projection"])
    scope["_in_projection_packed"] = packed_projections or torchs_own
    return OpenedAttention(opened(F.multi_head_attention_forward), torchs_own)
