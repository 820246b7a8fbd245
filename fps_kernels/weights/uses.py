"""What a watched forward pass did with the weights: where each of them was multiplied by, and where else it went."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.multiprocessing.reductions import StorageWeakRef

from fps_kernels.weights.kinds import SCORED_FUNCTIONS, Call, WeightKind, read_calls
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.normalised import NORMALISING, Normalisation
from fps_kernels.weights.parts import CASTS, Part, part_of, rows_of

Owner = tuple[str, torch.nn.Module, str]

_LOOKING = ("__set__()", "size()", "dim()", "stride()", "numel()", "is_contiguous()", "type()")  # not a use
_GATHERING = "fsdp"  # of the ops that bring sharded weights together
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

    def __init__(self, parameters: Mapping[str, Tensor], owners: Iterable[Owner]) -> None:
        self._owners = [owner for owner in owners if owner[0] in parameters]
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)
        # Copies in another dtype, by their memory: whose they are, where their numbers are there and in the weight.
        self._copies: dict[int, tuple[StorageWeakRef, str, Part, Part, Normalisation | None]] = {}

    @cached_property
    def _by_storage(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, p in self._parameters.items():
            found.setdefault(p.untyped_storage()._cdata, []).append(name)
        return found

    def find(self, tensor: Tensor) -> tuple[str, Part] | None:
        """The parameter that a tensor is, or is a view or a cast of, and which part of it."""
        name = self._names.get(id(tensor))
        if name is None and self._owners and isinstance(tensor, torch.nn.Parameter):  # its module, brought in, has it now
            owned = ((name, module._parameters.get(leaf)) for name, module, leaf in self._owners)
            name = next((name for name, p in owned if p is tensor), None)
        if name is not None:
            return name, Part.whole(tensor)
        memory = memory_of(tensor)
        storage, name, own, origin, _ = self._copies.get(memory or 0, (None, "", None, None, None))
        if storage is not None and not storage.expired() and own is not None and origin is not None:
            view = Part(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - own.offset)
            part = view.within(own, origin)
            return None if part is None else (name, part)
        for name in self.sharing(tensor):
            p = self._parameters[name]
            part = part_of(tensor, p)
            if part is not None and 0 <= part.offset <= sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)):
                return name, part
        return None

    def note_copy(self, copy: Tensor, weight: Any, normal: Normalisation | None = None) -> None:
        """Note that ``copy`` holds what a weight, or a part of one, holds, or that normalised, if ``weight`` is one."""
        found = self.find(unwrapped(weight)) if isinstance(weight, Tensor) else None
        memory = memory_of(copy)
        if found is not None and memory is not None and copy.is_floating_point() and memory != memory_of(weight):
            own = Part(tuple(copy.shape), copy.stride(), int(copy.storage_offset()))
            made = self.normalisation_of(weight) if normal is None else normal
            self._copies[memory] = StorageWeakRef(copy.untyped_storage()), found[0], own, found[1], made

    def normalisation_of(self, tensor: Tensor) -> Normalisation | None:
        """How what a tensor holds was made of a weight, if it was normalised."""
        return self._copies[memory_of(tensor) or 0][4] if self.is_copy(tensor) else None

    def is_copy(self, tensor: Tensor) -> bool:
        """Whether a tensor was noted as a copy, or lies in the memory of one."""
        storage, *_ = self._copies.get(memory_of(tensor) or 0, (None,))
        return storage is not None and not storage.expired()

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


def _namespace(func: Any) -> str | None:
    """Of a registered op."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace
    if isinstance(func, torch._ops.OpOverloadPacket):
        return str(func._qualified_op_name.partition("::")[0])
    return None


def _is_custom(func: Any) -> bool:
    """Whether a function is an op that somebody registered: its gradient, if it has one, is its author's."""
    namespace = _namespace(func)
    return namespace is not None and namespace not in _TORCHS_OWN


class Uses:
    """Reports multiplications by known weights, and keeps where else they went.

    Args:
        parameters: the parameters to look for, by name.
        on_use: called with each :class:`WeightUse`, before the multiplication runs.
        owners: of parameters that are replaced when they are brought in: their names, each with a module that has it and
            the name in there; one that is shared is there for each of its modules.

    Attributes:
        other_uses: for each parameter that went anywhere else, where it went first, such as ``matmul()``.
        transformed: for each parameter that multiplied inputs of a function transform, why those were not reported.
        hidden: for each parameter that went into a function of which nobody sees the inside, that function.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_use: Callable[[WeightUse], None],
        owners: Iterable[Owner] = (),
    ) -> None:
        self.table = WeightTable(parameters, owners)
        self._parameters = dict(parameters)
        self._on_use = on_use
        self.other_uses: dict[str, str] = {}
        self.transformed: dict[str, str] = {}
        self.hidden: dict[str, str] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function and note which weights it was given, and what they multiplied."""
        if func not in SCORED_FUNCTIONS:
            return self._elsewhere(func, args, kwargs)
        for call in read_calls(func, args, kwargs):
            found = self.table.find(unwrapped(call.weight))
            if found is not None:
                self._multiplies(func, call, *found)
                return func(*args, **kwargs)
        return self._elsewhere(func, args, kwargs)

    def _multiplies(self, func: Any, call: Call, name: str, part: Part) -> None:
        label = f"{func.__name__.partition('.')[0]}()"
        self._note(f"the input of {label}", (call.input, *call.others))
        if not torch._C._are_functorch_transforms_active():
            self._report(label, call, name, part)
        elif call.input is unwrapped(call.input) and call.weight is unwrapped(call.weight):  # the same as outside
            with temporarily_clear_interpreter_stack():
                self._report(label, call, name, part)
        else:
            self.transformed.setdefault(
                name,
                f"it multiplied only inside a function transform such as torch.vmap, by {label}: what it multiplied there "
                "cannot be looked at",
            )

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

    def _report(self, label: str, call: Call, name: str, part: Part) -> None:
        rows = rows_of(part, call.row_dims, self._parameters[name])
        if rows is None:
            self.other_uses.setdefault(name, f"{label} with some of its inputs only")
            return
        normal = self.table.normalisation_of(unwrapped(call.weight))
        if normal is not None and (rows.range is not None or normal.placed(rows.layout, call.kind) is None):
            self.other_uses.setdefault(name, f"{label} normalised along dimension {normal.dim}")
            return
        self._on_use(WeightUse(name, rows.layout, (rows.first, rows.stop), call.input, call.kind))

    def _elsewhere(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if _namespace(func) == _GATHERING:  # not the model's doing
            return result
        if type(result) is Tensor and args and (func in CASTS or func in NORMALISING):
            read = NORMALISING[func](*args, **kwargs) if func in NORMALISING else None
            if func in CASTS or read is not None:
                weight, normal = (args[0], None) if read is None else read[:2]
                self.table.note_copy(result, weight, normal)
            if self.table.is_copy(result):
                return result
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
