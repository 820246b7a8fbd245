"""A frozen weight whose chosen entries have gradients: how a model that knows nothing of it multiplies by it.

The weight stays the parameter that it was and takes part in the usual multiplication; only the function that it is given
to is called by way of this file, inside of a node that knows of the entries (:mod:`.layer_nodes`).
"""

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import resolve_name

from fps_kernels.tuning.agreement import Seen
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.gradient_nodes import compiled_gradient, without_gradient
from fps_kernels.tuning.layer_nodes import Layer, tuned_layer, tuned_linear
from fps_kernels.tuning.normalised_nodes import normalised_layer
from fps_kernels.weights.attention import opened_attention
from fps_kernels.weights.kinds import READERS, Call, WeightKind, read_calls
from fps_kernels.weights.kinds.linear import LINEAR
from fps_kernels.weights.matrix import is_simulated
from fps_kernels.weights.normalised import NORMALISING, Normalisation
from fps_kernels.weights.parts import CASTS, Part, in_same_memory, part_of, rows_of

_F_LINEAR = F.linear
_overrides_off = torch._C.DisableTorchFunctionSubclass
_is_compiling = torch.compiler.is_compiling
_gradients_enabled = torch.is_grad_enabled
_is_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_in_backward = torch._C._current_graph_task_id
_PLAIN = frozenset((Tensor, nn.Parameter))


class TunedWeight(nn.Parameter):
    """A weight that :func:`fps_kernels.attach` attached, or a part of one.

    The functions that the :mod:`~fps_kernels.weights.kinds` read, and attention, give gradients to its chosen entries. Any
    other function computes what it always did; a gradient that flows back to it is an error, so that none is lost in
    silence.

    Attributes:
        entries: the chosen entries and their values.
        part: for a view of the weight, or a copy of one in another dtype: which part it is.
        direct: a whole matrix, whose rows are output neurons.
        normal: for what was made of the weight: how its rows were normalised.
    """

    entries: SelectedEntries
    part: Part | None
    direct: bool
    normal: Normalisation | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _F_LINEAR and not kwargs and not _is_compiling():
            with _overrides_off():
                return _linear(*args)
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return _OPEN_ATTENTION(*args, **kwargs)  # arrives here again, at each of its projections
        with torch._C.DisableTorchFunctionSubclass():
            handler = _HANDLERS.get(func)
            if handler is not None:
                return handler(func, *args, **kwargs)
            return _elsewhere(func, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TunedWeight":
        if id(self) in memo:
            return cast(TunedWeight, memo[id(self)])
        self.entries.settle()
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            copied = become_tuned(nn.Parameter(self.data.clone(memory_format=torch.preserve_format), requires_grad=False))
        memo[id(self)] = copied
        copied.entries, copied.part, copied.direct = copy.deepcopy(self.entries, memo), self.part, self.direct
        copied.normal = self.normal
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{self.entries.name} is attached and cannot be pickled: save model.state_dict(), or detach the tuner first"
        )


class _SimulatedTunedWeight(TunedWeight, FakeTensor):
    """A weight without memory that was attached."""


def become_tuned(weight: Tensor) -> TunedWeight:
    """Make a weight an attached one, in place, so that all that refers to it sees it; its ``entries`` are to be set."""
    weight.__class__ = _SimulatedTunedWeight if isinstance(weight, FakeTensor) else TunedWeight
    tuned = cast(TunedWeight, weight)
    tuned.part, tuned.direct, tuned.normal = None, False, None
    return tuned


def hold(entries: SelectedEntries) -> None:
    """Make the weight know its entries, where it does not (any more)."""
    weight = entries.weight
    if not isinstance(weight, TunedWeight):
        tuned = become_tuned(weight)
        tuned.entries, tuned.direct = entries, entries.layout.is_plain
        nn.Parameter.requires_grad_(weight, False)


def become_plain(weight: Tensor) -> None:
    """The reverse of :func:`become_tuned`."""
    if not isinstance(weight, TunedWeight):
        return  # torch has swapped what it is with another tensor
    weight.__class__ = FakeTensor if isinstance(weight, FakeTensor) else nn.Parameter  # type: ignore[assignment]
    for name in ("entries", "part", "direct", "normal"):
        del weight.__dict__[name]


# ------------------------------------------------------------------------------------------------ multiplications


def _follow(seen: Seen) -> None:
    """Whoever changed the values, or the weight, since they agreed: this multiplication uses what they are now."""
    for scope in seen.scopes:
        if scope.thread:  # they agreed when that pass began: who writes inside of it leaves a trace
            if seen.numbers._version != seen.values_version or seen.stored._version != seen.weight_version:
                seen.entries.settle()
            return
    if _in_backward() < 0 or seen.moved():
        seen.entries.settle()
        if len(seen.scopes) == 1:
            seen.scopes[0].open_inner()


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` as nearly every layer calls it; what is unusual goes the general way."""
    if (
        type(weight) is TunedWeight
        and weight.direct
        and type(x) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and not _dispatch_modes()
        and not _is_transformed()
        and forward_ad._current_level < 0
    ):
        seen = weight.entries.seen
        own = seen.own
        if seen.parameters["values"] is own:
            _follow(seen)
            if _gradients_enabled() and own.requires_grad:
                return tuned_linear(x, bias, seen)
            return F.linear(x, weight, bias)
    return _multiply(F.linear, x, weight, bias)


def _linear_forward(module: nn.Linear, input: Tensor) -> Tensor:
    """``nn.Linear.forward`` by the shorter way: what torch does to find the override, and to look up parameters in a module,
    costs as much as the layer's node. Whatever is not as it was attached goes the usual way."""
    parameters = module._parameters
    weight = parameters["weight"]
    if type(weight) is TunedWeight and not _function_modes() and not _is_compiling():
        with _overrides_off():
            y: Tensor = _linear(input, weight, parameters["bias"])
            return y
    return F.linear(input, module.weight, module.bias)


def shorten(owner: nn.Module) -> None:
    """Let a module call :func:`_linear_forward`, if it is a linear layer and nobody has replaced its ``forward``."""
    if type(owner) is nn.Linear and "forward" not in owner.__dict__:
        owner.__dict__["forward"] = MethodType(_linear_forward, owner)


def lengthen(owner: nn.Module) -> None:
    """The reverse of :func:`shorten`. A method that somebody else holds by now goes the usual way."""
    if getattr(owner.__dict__.get("forward"), "__func__", None) is _linear_forward:
        del owner.__dict__["forward"]


def _multiply(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that some kind of weight multiplies by: its result with a gradient for the weight's chosen entries."""
    found = _served(read_calls(func, args, kwargs))
    if found is None:
        return _elsewhere(func, *args, **kwargs)
    call, rows = found
    weight, x = call.weight, call.input
    entries = weight.entries
    values = entries._parameters["values"]
    if _is_compiling():
        wanted = _gradients_enabled() and values.requires_grad
        y = func(*args, **kwargs)
        return _compiled(y, x, weight, call.kind, rows) if wanted else y
    layer = Layer(func, args, kwargs, call.kind, weight, entries, rows, call.kind.channel_dim(x), call.row_dims)
    if _is_transformed() or forward_ad._current_level >= 0 or values is not entries.own:
        return _transformed(layer, values)
    if not is_simulated(entries.own):
        _follow(entries.seen)
    if not _gradients_enabled() or not values.requires_grad:
        return func(*args, **kwargs)
    values = entries.seen.values
    bias = call.others[0] if call.others else None
    if weight.normal is not None:
        normal = weight.normal.placed(entries.layout, call.kind)
        assert normal is not None
        return normalised_layer(layer, x, bias, values, normal)
    return tuned_layer(layer, x, bias, values)


def _served(calls: tuple[Call, ...]) -> tuple[Call, tuple[int, int] | None] | None:
    """How a call multiplies by chosen entries, and by which rows of their weight; ``None`` where it does otherwise."""
    for call in calls:
        weight = call.weight
        if not isinstance(weight, TunedWeight) or any(
            isinstance(other, TunedWeight) for other in (call.input, *call.others)
        ):
            continue
        entries, part = weight.entries, weight.part
        layout = entries.layout
        if part is None and layout.row_dims == call.row_dims and layout.blocks == 1:
            return call, None
        if not _is_compiling():
            rows = rows_of(Part.whole(entries.weight) if part is None else part, call.row_dims, entries.weight)
            normal = weight.normal
            if rows is None or rows.layout != layout:
                continue
            if normal is None or (rows.range is None and normal.placed(layout, call.kind) is not None):
                return call, rows.range
    return None


def _transformed(layer: Layer, values: Tensor) -> Any:
    """Inside of a transform of functions (``torch.func``, forward-mode derivatives) or of a functional call: the weight as a
    function of the values, and whatever derivative of that is asked for. It is as large as the weight."""
    if layer.entries.is_sharded:
        raise RuntimeError(
            f"{layer.entries.name} is sharded: functional calls and transforms of functions take no sharded models"
        )
    weight = layer.effective_weight(values)
    if weight.dtype != layer.weight.dtype:
        weight = weight.to(layer.weight.dtype)
    args = tuple(weight if a is layer.weight else a for a in layer.args)
    return layer.function(*args, **{k: weight if a is layer.weight else a for k, a in layer.kwargs.items()})


def _compiled(y: Tensor, x: Tensor, weight: TunedWeight, kind: WeightKind, rows: tuple[int, int] | None) -> Tensor:
    entries = weight.entries
    values: Tensor = entries.seen.values
    row_offsets, columns, channels = entries.row_offsets, entries.columns, entries.distinct
    if kind.channel_dim(x) is None:
        columns, channels = entries.selection.columns, None
    if rows is not None:
        part = entries.slice_of(rows)
        row_offsets, columns, values = entries.row_offsets_of(rows), columns[part], values[part]
    return compiled_gradient(y, x, values, row_offsets, columns, channels, kind)


def _projection(input: Tensor, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` inside attention. A compiler lets no override lead to another one: this leads to it directly."""
    if torch.compiler.is_compiling():
        return _multiply(F.linear, input, weight, bias)
    return F.linear(input, weight, bias)


def _packed_projections(q: Tensor, k: Tensor, v: Tensor, w: Any, b: Any = None) -> Any:
    """The three projections of attention by one weight."""
    if not torch.compiler.is_compiling() or not isinstance(w, TunedWeight) or (q is k and k is v):
        return _TORCHS_PACKED_PROJECTIONS(q, k, v, w, b)
    # Parts of a weight are plain tensors to a compiler: it is told here which rows they are.
    width, projected = q.shape[-1], []
    with torch._C.DisableTorchFunctionSubclass():
        wanted = torch.is_grad_enabled() and w.entries.values.requires_grad
        for i, x in enumerate((q, k, v)):
            rows = (i * width, (i + 1) * width)
            y = F.linear(x, w[rows[0] : rows[1]], None if b is None else b[rows[0] : rows[1]])
            projected.append(_compiled(y, x, w, LINEAR, rows) if wanted else y)
    return projected


_TORCHS_PACKED_PROJECTIONS = opened_attention(_projection).packed_projections
_OPEN_ATTENTION = opened_attention(_projection, _packed_projections).forward


# ------------------------------------------------------------------------------------------------ parts of a weight


def _part(weight: TunedWeight, tensor: Tensor, part: Part) -> Tensor:
    tuned = become_tuned(tensor if isinstance(tensor, FakeTensor) else tensor.as_subclass(nn.Parameter))
    tuned.entries, tuned.part, tuned.normal = weight.entries, part, weight.normal
    return tuned


def _normalise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that may normalise a weight's rows: its result stands for the weight, where it does."""
    read = None if _is_compiling() else NORMALISING[func](*args, **kwargs)
    weight = None if read is None else read[0]
    if read is None or not isinstance(weight, TunedWeight) or weight.normal is not None or not _gradients_enabled():
        return _elsewhere(func, *args, **kwargs)
    entries, part = weight.entries, weight.part or Part.whole(weight.entries.weight)
    if read[2] is not None:
        rows = rows_of(part, read[2], entries.weight)
        if rows is None or rows.range is not None or rows.layout.row_dims != (read[1].dim,):
            return _elsewhere(func, *args, **kwargs)
    elif part != Part.whole(entries.weight):
        return _elsewhere(func, *args, **kwargs)
    if not is_simulated(entries.own):
        _follow(entries.seen)
    with torch.no_grad():
        made = func(*args, **kwargs)
    tuned = cast(TunedWeight, _part(weight, made, part))
    tuned.normal = read[1]
    return tuned


def _with_parts(result: Any, weight: TunedWeight) -> Any:
    """``result`` of a function, with views of the weight made parts of it; ``None`` where it has others than these."""
    if isinstance(result, list | tuple):
        items = [_with_parts(item, weight) for item in result]
        return None if any(item is None for item in items) else type(result)(items)
    if not isinstance(result, Tensor) or not in_same_memory(result, weight):
        return None
    part = part_of(result, weight)
    if part is not None and weight.part is not None:
        part = part.within(Part.whole(weight), weight.part)
    return None if part is None else _part(weight, result, part)


def _freeze(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """``requires_grad_`` and ``requires_grad =``: an attached weight stays frozen, whatever is done to a whole model."""
    return weight if isinstance(weight, TunedWeight) else func(weight, *args, **kwargs)


def _cast(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(weight, *args, **kwargs)
    if not isinstance(weight, TunedWeight) or not torch.is_grad_enabled() or not result.is_floating_point():
        return result
    if result is weight:
        return result
    return _part(weight, result, Part.whole(weight.entries.weight) if weight.part is None else weight.part)


# ------------------------------------------------------------------------------------------------ everything else

# These do not use the numbers, or have no gradient on purpose.
_LOOKING = frozenset(
    "detach untyped_storage new_empty new_zeros new_ones new_full new_tensor empty_like zeros_like ones_like full_like "  # noqa: SIM905
    "rand_like randn_like __repr__ __format__ __set__ set_data".split()
)
_LOOKED_AT = frozenset(("data", "grad"))  # properties that are tensors and no part of a computation


def _looks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _LOOKED_AT
    return name in _LOOKING


def _weights_in(values: Any) -> Iterator[TunedWeight]:
    for value in values:
        if isinstance(value, TunedWeight):
            yield value
        elif isinstance(value, list | tuple):
            yield from _weights_in(value)


def _elsewhere(func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor | list | tuple | None) or not torch.is_grad_enabled() or _looks(func):
        return result
    weight = next((w for w in _weights_in((*args, *kwargs.values())) if w.entries.values.requires_grad), None)
    if weight is None or result is weight:
        return result
    if not _is_compiling() and (parts := _with_parts(result, weight)) is not None:
        return parts
    message = (
        f"a gradient reached {weight.entries.name} through {resolve_name(func) or func}, which attach() does not know: "
        "exclude that weight from the selection, or use weight.detach() there"
    )
    out = kwargs.get("out")
    written = [t for t in (out if isinstance(out, list | tuple) else (out, *args[:1])) if isinstance(t, Tensor)]
    if out is not None or func is Tensor.__setitem__ or any(result is t for t in written):
        if any(t.requires_grad for t in written):  # part of a computation, and in use elsewhere: its node cannot be wrapped
            raise RuntimeError(message)
        return result  # a buffer that numbers are copied into, as an average of weights
    return without_gradient(result, weight.entries.seen.values, message)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(READERS, _multiply),
    torch.Tensor.requires_grad_: _freeze,
    torch.Tensor.requires_grad.__set__: _freeze,  # type: ignore[attr-defined]
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(NORMALISING, _normalise),
}
