"""Seeing every weight a model multiplies with, without knowing its modules.

Hooks on ``nn.Linear`` miss models that call ``F.linear`` themselves (BEiT, EVA) and ``nn.MultiheadAttention``. A
``TorchFunctionMode`` around the forward sees every weight matrix arrive at one of three functions: ``F.linear``,
``F.conv2d`` and, for Hugging Face's ``Conv1D``, ``torch.addmm``. ``F.multi_head_attention_forward`` is opened, so that
the projections inside it arrive at ``F.linear`` as well.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fps_kernels.weights.matrix import MatrixLayout

# The ops are what programs of torch.export call.
_LINEAR = (F.linear, torch.ops.aten.linear.default)
_CONV2D = (F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_ADDMM = (torch.addmm, torch.ops.aten.addmm.default)
_LOOKING = ("__set__()", "size()", "dim()", "stride()", "numel()", "is_contiguous()", "type()")  # not a use


@dataclass(frozen=True)
class Convolution:
    """The geometry of a 2-D convolution, padding as ``(top, bottom, left, right)``."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class WeightUse:
    """One multiplication by (some rows of) a weight.

    Attributes:
        name: the parameter's name.
        layout: how the parameter is read as a matrix.
        rows: the half-open range of matrix rows that took part.
        input: what they multiplied: ``[..., C]``, or ``[B, C_in, H, W]`` for a convolution.
        convolution: its geometry, ``None`` for a linear map.
    """

    name: str
    layout: MatrixLayout
    rows: tuple[int, int]
    input: Tensor
    convolution: Convolution | None


def opened_attention(linear: Callable[..., Tensor] = F.linear) -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` without its own check for overrides, so that what it calls can be seen.

    Args:
        linear: what its projections call.
    """
    scope = dict(F.multi_head_attention_forward.__globals__)
    scope |= {"has_torch_function": lambda _: False, "linear": linear}

    def opened(closed: Any) -> Callable[..., Any]:
        function = types.FunctionType(closed.__code__, scope, closed.__name__, closed.__defaults__, closed.__closure__)
        function.__kwdefaults__ = closed.__kwdefaults__
        return function

    for name in ("_in_projection_packed", "_in_projection"):
        scope[name] = opened(scope[name])
    return opened(F.multi_head_attention_forward)


_OPEN_ATTENTION = opened_attention()


class WeightTable:
    """Finds the parameter that a tensor is, or is some rows of."""

    def __init__(self, parameters: Mapping[str, Tensor], owners: Mapping[str, tuple[torch.nn.Module, str]]) -> None:
        self._owners = {name: owner for name, owner in owners.items() if name in parameters}
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self._by_storage: dict[int, list[str]] = {}
        for name, p in parameters.items():
            self._by_storage.setdefault(p.untyped_storage()._cdata, []).append(name)

    def name(self, tensor: Tensor) -> str | None:
        """The parameter that ``tensor`` is, itself."""
        return self._names.get(id(tensor))

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


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def convolution_geometry(
    input: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Convolution:
    kernel, spread = (int(weight.shape[2]), int(weight.shape[3])), _pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
        sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        vertical, horizontal = _pair(padding)
        sides = (vertical, vertical, horizontal, horizontal)
    return Convolution(kernel, _pair(stride), sides, spread, int(groups))


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
        self._table = WeightTable(parameters, owners or {})
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._on_use = on_use
        self.other_uses: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _OPEN_ATTENTION(*args, **kwargs)
        if func in _LINEAR:
            self._linear(*args, **kwargs)
        elif func in _CONV2D:
            self._conv2d(*args, **kwargs)
        elif func in _ADDMM:
            self._addmm(*args, **kwargs)
        else:
            return self._other(func, args, kwargs)
        return func(*args, **kwargs)

    def _report(self, weight: Tensor, input: Tensor, convolution: Convolution | None, transposed: bool) -> bool:
        found = self._table.find(weight)
        if found is None:
            return False
        name, first, view_transposed = found
        shape = self._shapes[name]
        layout = MatrixLayout(shape, transposed != view_transposed)
        if transposed or view_transposed:
            if tuple(weight.shape) != (shape[::-1] if view_transposed else shape):
                return False  # some inputs of a transposed weight, not some of its output neurons
            rows = (0, layout.shape[0])
        else:
            rows = (first, first + weight.shape[0])
        self._on_use(WeightUse(name, layout, rows, input, convolution))
        return True

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> None:
        self._note("the input of linear()", (input,))
        if weight.dim() == 2:
            self._report(weight, input, None, transposed=False)

    def _conv2d(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        self._note("the input of conv2d()", (input,))
        image = input.unsqueeze(0) if input.dim() == 3 else input
        self._report(weight, image, convolution_geometry(image, weight, *args, **kwargs), transposed=False)

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> None:
        self._note("the input of addmm()", (input, mat1))
        self._report(mat2, mat1, None, transposed=True)

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
