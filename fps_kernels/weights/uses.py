"""What a watched forward pass did with the weights: where each of them was multiplied by, and where else it went."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fps_kernels.weights.kinds import SCORING_READERS, Call, WeightKind
from fps_kernels.weights.matrix import MatrixLayout

_LOOKING = ("__set__()", "size()", "dim()", "stride()", "numel()", "is_contiguous()", "type()")  # not a use
_TORCHS_OWN = ("aten", "prim", "prims")  # namespaces of ops that are differentiated, as functions of torch are


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


class WeightTable:
    """Finds the parameter that a tensor is, or is some rows of."""

    def __init__(self, parameters: Mapping[str, Tensor], owners: Mapping[str, tuple[torch.nn.Module, str]]) -> None:
        self._owners = {name: owner for name, owner in owners.items() if name in parameters}
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)

    @cached_property
    def _by_storage(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, p in self._parameters.items():
            found.setdefault(p.untyped_storage()._cdata, []).append(name)
        return found

    def find(self, tensor: Tensor) -> tuple[str, int, bool] | None:
        """``(name, first row, transposed)`` of the parameter whose rows ``tensor`` is a view of, if it is one."""
        name = self._names.get(id(tensor))
        if name is None and self._owners and isinstance(tensor, torch.nn.Parameter):  # its module, brought in, has it now
            owned = ((name, module._parameters.get(leaf)) for name, (module, leaf) in self._owners.items())
            name = next((name for name, p in owned if p is tensor), None)
        if name is not None:
            return name, 0, False
        for name in self.sharing(tensor):
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

    def sharing(self, tensor: Tensor) -> Iterable[str]:
        """Names of the parameters that lie in a tensor's memory."""
        memory = memory_of(tensor)
        return () if memory is None else self._by_storage.get(memory, ())

    def names_within(self, values: Iterable[Any]) -> Iterable[str]:
        """Names of the parameters among ``values``, looking one level into lists and tuples."""
        for value in values:
            name = self._names.get(id(value))
            if name is not None:
                yield name
            elif isinstance(value, list | tuple):
                yield from (self._names[id(v)] for v in value if id(v) in self._names)

    def names_sharing(self, values: Iterable[Any]) -> Iterable[str]:
        """Names of the parameters among ``values``, or that those are views of, looking one level into lists and tuples."""
        for value in values:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    found = self.find(unwrapped(tensor))
                    yield from self.sharing(tensor) if found is None else (found[0],)


def memory_of(tensor: Tensor) -> int | None:
    """What tells apart the memory that tensors lie in; ``None`` for those that lie in none."""
    try:
        return int(unwrapped(tensor).untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and opaque ones
        return None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside of those that ``torch.vmap`` and other function transforms compute with."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _is_custom(func: Any) -> bool:
    """Whether a function is an op that somebody registered: its gradient, if it has one, is its author's."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace not in _TORCHS_OWN
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.partition("::")[0] not in _TORCHS_OWN
    return False


class Uses:
    """Reports multiplications by known weights, and keeps where else they went.

    Args:
        parameters: the parameters to look for, by name.
        on_use: called with each :class:`WeightUse`, before the multiplication runs.
        owners: of parameters that are replaced when they are brought in: the module, and their name in it.

    Attributes:
        other_uses: for each parameter that went anywhere else, where it went first, such as ``matmul()``.
        transformed: for each parameter that multiplied inputs of a function transform, why those were not reported.
        hidden: for each parameter that went into a function of which nobody sees the inside, that function.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_use: Callable[[WeightUse], None],
        owners: Mapping[str, tuple[torch.nn.Module, str]] | None = None,
    ) -> None:
        self.table = WeightTable(parameters, owners or {})
        self._parameters = dict(parameters)
        self._on_use = on_use
        self.other_uses: dict[str, str] = {}
        self.transformed: dict[str, str] = {}
        self.hidden: dict[str, str] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function and note which weights it was given, and what they multiplied."""
        read = SCORING_READERS.get(func)
        call = None if read is None else read(*args, **kwargs)
        if call is None:
            return self._elsewhere(func, args, kwargs)
        label = f"{func.__name__.partition('.')[0]}()"
        self._note(f"the input of {label}", (call.input, *call.others))
        found = self.table.find(unwrapped(call.weight))
        if found is None:
            pass
        elif not torch._C._are_functorch_transforms_active():
            self._report(call, *found)
        elif call.input is unwrapped(call.input) and call.weight is unwrapped(call.weight):  # the same as outside
            with temporarily_clear_interpreter_stack():
                self._report(call, *found)
        else:
            self.transformed.setdefault(
                found[0],
                f"it multiplied only inside a function transform such as torch.vmap, by {label}: what it multiplied there "
                "cannot be looked at",
            )
        return func(*args, **kwargs)

    def note_hidden(self, label: str, values: Iterable[Any]) -> None:
        """Note what a function of which nobody sees the inside was given."""
        with torch._C.DisableTorchFunction():  # looking at a weight is no use of it
            names = list(self.table.names_sharing(values))
        for name in names:
            self.hidden.setdefault(name, label)

    def why_hidden(self, name: str) -> str:
        """Why a weight of :attr:`hidden` cannot be chosen from, even if it multiplied something elsewhere."""
        return (
            f"it is used in {self.hidden[name]}, which cannot be intercepted: it cannot be trained, since the gradient that "
            "it gets there would be lost"
        )

    def _report(self, call: Call, name: str, first: int, view_transposed: bool) -> None:
        shape = tuple(self._parameters[name].shape)
        layout = MatrixLayout(shape, call.transposed != view_transposed)
        if call.transposed or view_transposed:
            if tuple(call.weight.shape) != (shape[::-1] if view_transposed else shape):
                return  # some inputs of a transposed weight, not some of its output neurons
            rows = (0, layout.shape[0])
        else:
            rows = (first, first + call.weight.shape[0])
        self._on_use(WeightUse(name, layout, rows, call.input, call.kind))

    def _elsewhere(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        label = f"{getattr(func, '__name__', func)}()"
        if label == "__get__()":  # a property: some are views (w.T), the others only look at a weight
            label = f"Tensor.{func.__self__.__name__}"
            if not isinstance(result, Tensor) or label == "Tensor.grad":
                return result
        if label not in _LOOKING:
            values = (*args, *kwargs.values())
            self._note(label, values)
            if _is_custom(func):
                self.note_hidden(f"torch.ops.{func}", values)
        return result

    def _note(self, label: str, values: Iterable[Any]) -> None:
        for name in self.table.names_within(values):
            self.other_uses.setdefault(name, label)
