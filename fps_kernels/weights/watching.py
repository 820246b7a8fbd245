"""Seeing every weight a model multiplies with, without knowing its modules.

Hooks on ``nn.Linear`` miss models that call ``F.linear`` themselves (BEiT, EVA) and ``nn.MultiheadAttention``. Every weight
matrix arrives at one of a few functions, those that the :mod:`~fps_kernels.weights.kinds` read, and torch tells of them.
Attention is opened, so that the projections inside it arrive there as well.

There are two ways to be told. Weights can be of a class of their own meanwhile (:mod:`.watched_weight`), which is told only
of functions that are given a weight. A ``TorchFunctionMode`` is told of every function, which takes half as long as the
forward pass of a small model; it recognises weights by their memory, so that it finds those that are no plain parameters,
are brought in when they are needed, or that somebody else has a view of. The first is used where it sees all that the
second does.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fps_kernels.weights.attention import opened_attention
from fps_kernels.weights.hidden_functions import listening
from fps_kernels.weights.kinds import SCORED_FUNCTIONS
from fps_kernels.weights.uses import Owner, Uses, WeightUse
from fps_kernels.weights.watched_weight import Taker, WatchedWeights, can_be_watched

__all__ = ["WeightInterception", "WeightUse"]

_OPEN_ATTENTION = opened_attention().forward
_READ = frozenset((F.multi_head_attention_forward, *SCORED_FUNCTIONS))
_OPS = frozenset((torch._ops.OpOverload, torch._ops.OpOverloadPacket))
_NO_WEIGHT = frozenset((Tensor, int, float, bool, str, type(None), slice, torch.dtype, torch.device, torch.Size))


class WeightInterception(Uses):
    """Calls ``on_use`` for every multiplication by a known weight that happens inside the ``with`` block.

    Args:
        parameters: the parameters to look for, by name.
        on_use: called with each :class:`WeightUse`, before the multiplication runs.
        owners: of parameters that are replaced when they are brought in: their names, each with a module that has it and
            the name in there.
        takers: functions that may be given the inputs that ``F.linear`` multiplies by a weight as it is, without a
            :class:`WeightUse`, by the weight's name; they return whether they took one, ``on_use`` gets it otherwise.

    Attributes:
        other_uses: for each parameter that went anywhere else, where it went first, such as ``matmul()``.

    Example:
        >>> with WeightInterception(dict(model.named_parameters()), print):
        ...     model(x)
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_use: Callable[[WeightUse], None],
        owners: Iterable[Owner] = (),
        takers: Mapping[str, Taker] | None = None,
    ) -> None:
        owners = list(owners)
        super().__init__(parameters, on_use, owners)
        self._replaced = bool(owners)
        self._weights = WatchedWeights(self._parameters, self, takers or {})
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Asked each time: what somebody else has a view of may have changed since.
            direct = not self._replaced and can_be_watched(self._parameters.values())
            stack.enter_context(listening(self.note_hidden))
            stack.enter_context(self._weights if direct else _Mode(self))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class _Mode(TorchFunctionMode):
    """Is told of every function."""

    def __init__(self, uses: Uses) -> None:
        super().__init__()
        self._uses = uses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not kwargs and func not in _READ and type(func) not in _OPS and all(type(a) in _NO_WEIGHT for a in args):
            return func(*args)  # nearly all of them: nothing to see
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _OPEN_ATTENTION(*args, **kwargs)
        return self._uses.run(func, args, kwargs)
