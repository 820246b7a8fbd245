"""A frozen weight whose chosen entries have gradients: how a model that knows nothing of it multiplies by it.

The weight stays the parameter that it was and takes part in the usual multiplication; only the function that it is given
to is called by way of this file, which puts one more autograd node behind the result (:mod:`.sampled_gradients`).
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import resolve_name

from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.gradient_nodes import with_sampled_gradient, without_gradient
from fps_kernels.weights.attention import opened_attention
from fps_kernels.weights.kinds import READERS, Call, WeightKind
from fps_kernels.weights.kinds.linear import LINEAR


class TunedWeight(nn.Parameter):
    """A weight that :func:`fps_kernels.attach` attached, or a part of one.

    The functions that the :mod:`~fps_kernels.weights.kinds` read, and attention, give gradients to its chosen entries. Any
    other function computes what it always did; a gradient that flows back to it is an error, so that none is lost in
    silence.

    Attributes:
        entries: the chosen entries and their values.
        rows: for a part: the half-open range of the weight's rows that it is.
        transposed: for a part: it is the transposed weight.
    """

    entries: SelectedEntries
    rows: tuple[int, int] | None
    transposed: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
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
        self.entries.synchronise()
        with torch._C.DisableTorchFunctionSubclass():
            copied = become_tuned(nn.Parameter(self.data.clone(memory_format=torch.preserve_format), requires_grad=False))
        memo[id(self)] = copied
        copied.entries = copy.deepcopy(self.entries, memo)
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
    tuned.rows, tuned.transposed = None, False
    return tuned


def become_plain(weight: TunedWeight) -> None:
    """The reverse of :func:`become_tuned`."""
    weight.__class__ = FakeTensor if isinstance(weight, FakeTensor) else nn.Parameter  # type: ignore[assignment]
    for name in ("entries", "rows", "transposed"):
        del weight.__dict__[name]


def _wants_gradient(weight: TunedWeight) -> bool:
    entries = weight.entries
    if not torch.compiler.is_compiling():
        entries.check_devices()
        entries.synchronise()  # whoever changed the values, or the weight: this multiplication uses what they are now
    return torch.is_grad_enabled() and entries.values.requires_grad


# ------------------------------------------------------------------------------------------------ multiplications


def _multiply(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that some kind of weight multiplies by: its result with a gradient for the weight's chosen entries."""
    call = READERS[func](*args, **kwargs)
    if call is None or not _serves(call):
        return _elsewhere(func, *args, **kwargs)
    wanted = _wants_gradient(call.weight)
    y = func(*args, **kwargs)
    return _multiplied(y, call.input, call.weight, call.kind, call.weight.rows) if wanted else y


def _serves(call: Call) -> bool:
    weight = call.weight
    if not isinstance(weight, TunedWeight) or any(isinstance(other, TunedWeight) for other in (call.input, *call.others)):
        return False
    if weight.rows is not None and call.kind.groups > 1:  # some rows of a grouped weight multiply other channels
        return False
    return call.transposed == (weight.transposed != weight.entries.layout.transposed)


def _multiplied(y: Tensor, x: Tensor, weight: TunedWeight, kind: WeightKind, rows: tuple[int, int] | None) -> Tensor:
    entries = weight.entries
    values: Tensor = entries.values
    row_offsets, columns, channels = entries.row_offsets, entries.columns, entries.distinct
    if kind.channel_dim(x) is None:
        columns, channels = entries.selection.columns, None
    if rows is not None:
        first, last = rows
        begin, end = entries.begin_of(first), entries.begin_of(last)
        values, columns = values[begin:end], columns[begin:end]
        row_offsets = row_offsets[first : last + 1] - begin
    return with_sampled_gradient(y, x, values, row_offsets, columns, channels, kind)


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
        wanted = _wants_gradient(w)
        for i, x in enumerate((q, k, v)):
            rows = (i * width, (i + 1) * width)
            y = F.linear(x, w[rows[0] : rows[1]], None if b is None else b[rows[0] : rows[1]])
            projected.append(_multiplied(y, x, w, LINEAR, rows) if wanted else y)
    return projected


_TORCHS_PACKED_PROJECTIONS = opened_attention(_projection).packed_projections
_OPEN_ATTENTION = opened_attention(_projection, _packed_projections).forward


# ------------------------------------------------------------------------------------------------ parts of a weight


def _part(weight: TunedWeight, part: Tensor, rows: tuple[int, int] | None, transposed: bool) -> Tensor:
    tuned = become_tuned(part.as_subclass(nn.Parameter))
    tuned.entries, tuned.rows, tuned.transposed = weight.entries, rows, transposed
    return tuned


def _has_row_parts(weight: Any) -> bool:
    return isinstance(weight, TunedWeight) and not weight.transposed and not weight.entries.layout.transposed


def _split(func: Any, *args: Any, **kwargs: Any) -> Any:
    """``split`` and ``chunk``: the projections inside cross-attention are rows of one weight."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if not args or not _has_row_parts(args[0]) or dim != 0:
        return _elsewhere(func, *args, **kwargs)
    weight, found = args[0], []
    first = weight.rows[0] if weight.rows else 0
    for part in func(*args, **kwargs):
        found.append(_part(weight, part, (first, first + part.shape[0]), transposed=False))
        first += part.shape[0]
    return tuple(found)


def _getitem(func: Any, weight: Any, index: Any) -> Any:
    if not _has_row_parts(weight) or not isinstance(index, slice) or index.step not in (None, 1):
        return _elsewhere(func, weight, index)
    part = func(weight, index)
    first = index.indices(weight.shape[0])[0] + (weight.rows[0] if weight.rows else 0)
    return _part(weight, part, (first, first + part.shape[0]), transposed=False)


def _transpose(func: Any, *args: Any, **kwargs: Any) -> Any:
    weight = args[0] if args else None
    if kwargs or not isinstance(weight, TunedWeight) or weight.dim() != 2 or weight.rows:
        return _elsewhere(func, *args, **kwargs)
    return _part(weight, func(*args), None, not weight.transposed)


def _freeze(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """``requires_grad_`` and ``requires_grad =``: an attached weight stays frozen, whatever is done to a whole model."""
    return weight if isinstance(weight, TunedWeight) else func(weight, *args, **kwargs)


def _cast(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(weight, *args, **kwargs)
    if not isinstance(weight, TunedWeight) or not torch.is_grad_enabled() or not result.is_floating_point():
        return result
    return result if result is weight else _part(weight, result, weight.rows, weight.transposed)


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
    message = (
        f"a gradient reached {weight.entries.name} through {resolve_name(func) or func}, which attach() does not know: "
        "exclude that weight from the selection, or use weight.detach() there"
    )
    changed = next((a for a in args[:1] if isinstance(a, Tensor) and (result is a or func is Tensor.__setitem__)), None)
    if changed is not None or kwargs.get("out") is not None:  # written into another tensor, which may be in use elsewhere
        raise RuntimeError(message)
    return without_gradient(result, weight.entries.values, message)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(READERS, _multiply),
    torch.Tensor.split: _split,
    torch.Tensor.chunk: _split,
    torch.split: _split,
    torch.chunk: _split,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.t: _transpose,
    torch.t: _transpose,
    torch.Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _freeze,
    torch.Tensor.requires_grad.__set__: _freeze,  # type: ignore[attr-defined]
    torch.Tensor.to: _cast,
    torch.Tensor.type: _cast,
    torch.Tensor.float: _cast,
    torch.Tensor.half: _cast,
    torch.Tensor.bfloat16: _cast,
    torch.Tensor.contiguous: _cast,
}
