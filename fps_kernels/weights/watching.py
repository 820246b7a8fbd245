"""Seeing every weight a model multiplies with, without knowing its modules.

Hooks on ``nn.Linear`` miss models that call ``F.linear`` themselves (BEiT, EVA) and ``nn.MultiheadAttention``. A
``TorchFunctionMode`` around the forward sees every weight matrix arrive at one of a few functions: those that the
:mod:`~fps_kernels.weights.kinds` read. Attention is opened, so that the projections inside it arrive there as well.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fps_kernels.weights.attention import opened_attention
from fps_kernels.weights.kinds import SCORING_READERS, Call, WeightKind
from fps_kernels.weights.matrix import MatrixLayout

_LOOKING = ("__set__()", "size()", "dim()", "stride()", "numel()", "is_contiguous()", "type()")  # not a use
_OPEN_ATTENTION = opened_attention().forward


@dataclass(frozen=True)
class WeightUse:
    """One multiplication by (some rows of) a weight.

    Attributes:
        name: the parameter's name.
        layout: how the parameter is read as a matrix.
        rows: the half-open range of matrix rows that took part.
        input: what they multiplied.
        kind: how.
    """

    name: str
    layout: MatrixLayout
    rows: tuple[int, int]
    input: Tensor
    kind: WeightKind


class _WeightTable:
    """Finds the parameter that a tensor is, or is some rows of."""

    def __init__(self, parameters: Mapping[str, Tensor], owners: Mapping[str, tuple[torch.nn.Module, str]]) -> None:
        self._owners = {name: owner for name, owner in owners.items() if name in parameters}
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self._by_storage: dict[int, list[str]] = {}
        for name, p in parameters.items():
            self._by_storage.setdefault(p.untyped_storage()._cdata, []).append(name)

    def find(self, tensor: Tensor) -> tuple[str, int, bool] | None:
        """``(name, first row, transposed)`` of the parameter whose rows ``tensor`` is a view of, if it is one."""
        name = self._names.get(id(tensor))
        if name is None and isinstance(tensor, torch.nn.Parameter):  # the module that it was brought in for has it now
            owned = ((name, module._parameters.get(leaf)) for name, (module, leaf) in self._owners.items())
            name = next((name for name, p in owned if p is tensor), None)
        if name is not None:
            return name, 0, False
        for name in self._by_storage.get(tensor.untyped_storage()._cdata, ()):
            p = self._parameters[name]
            if p.dim() != tensor.dim() or p.dim() < 2 or tensor.dtype != p.dtype:
                continue
            offset = int(tensor.storage_offset()) - int(p.storage_offset())
            if tensor.stride() == p.stride() and tensor.shape[1:] == p.shape[1:] and p.stride(0) > 0:
                first, rest = divmod(offset, p.stride(0))
                if rest == 0 and 0 <= first <= p.shape[0] - tensor.shape[0]:
                    return name, first, False
            if offset == 0 and p.dim() == 2 and tensor.shape == p.shape[::-1] and tensor.stride() == p.stride()[::-1]:
                return name, 0, True
        return None

    def names_within(self, values: Iterable[Any]) -> Iterable[str]:
        """Names of the parameters among ``values``, looking one level into lists and tuples."""
        for value in values:
            if isinstance(value, torch.nn.Parameter):
                name = self._names.get(id(value))
                if name is not None:
                    yield name
            elif isinstance(value, list | tuple):
                yield from self.names_within(v for v in value if isinstance(v, torch.nn.Parameter))


class WeightInterception(TorchFunctionMode):
    """Calls ``on_use`` for every multiplication by a known weight that happens inside the ``with`` block.

    Args:
        parameters: the parameters to look for, by name.
        on_use: called with each :class:`WeightUse`, before the multiplication runs.
        owners: of parameters that are replaced when they are brought in: the module, and their name in it.

    Attributes:
        other_uses: for each parameter that went anywhere else, where it went first, such as ``matmul()``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_use: Callable[[WeightUse], None],
        owners: Mapping[str, tuple[torch.nn.Module, str]] | None = None,
    ) -> None:
        super().__init__()
        self._table = _WeightTable(parameters, owners or {})
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._on_use = on_use
        self.other_uses: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _OPEN_ATTENTION(*args, **kwargs)
        read = SCORING_READERS.get(func)
        call = None if read is None else read(*args, **kwargs)
        if call is None:
            return self._other(func, args, kwargs)
        self._note(f"the input of {func.__name__.partition('.')[0]}()", (call.input, *call.others))
        self._report(call)
        return func(*args, **kwargs)

    def _report(self, call: Call) -> None:
        found = self._table.find(call.weight)
        if found is None:
            return
        name, first, view_transposed = found
        shape = self._shapes[name]
        layout = MatrixLayout(shape, call.transposed != view_transposed)
        if call.transposed or view_transposed:
            if tuple(call.weight.shape) != (shape[::-1] if view_transposed else shape):
                return  # some inputs of a transposed weight, not some of its output neurons
            rows = (0, layout.shape[0])
        else:
            rows = (first, first + call.weight.shape[0])
        self._on_use(WeightUse(name, layout, rows, call.input, call.kind))

    def _other(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        label = f"{getattr(func, '__name__', func)}()"
        if label == "__get__()":  # a property: some are views (w.T), the others only look at a weight
            label = f"Tensor.{func.__self__.__name__}"
            if not isinstance(result, Tensor) or label == "Tensor.grad":
                return result
        if label not in _LOOKING:
            self._note(label, (*args, *kwargs.values()))
        return result

    def _note(self, label: str, values: Iterable[Any]) -> None:
        for name in self._table.names_within(values):
            self.other_uses.setdefault(name, label)
