"""One autograd node for each multiplication by an attached weight: gradients of the input, of the bias and of the entries.

A node of its own for the entries, behind a layer that is computed as always, would cost a pass through autograd more, and an
optimizer that steps inside of the backward pass would change a weight that the layer still needs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fps_kernels import ops
from fps_kernels.selection import WeightSelection
from fps_kernels.tuning.agreement import Seen
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.saved_input import SMALL, Kept, computed_again, keep, kept_numbers, suits_kernel
from fps_kernels.weights.kinds import WeightKind
from fps_kernels.weights.kinds.linear import LINEAR
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.normalised import Normalisation
from fps_kernels.weights.parts import Part

_gradients_enabled = torch.is_grad_enabled
_implementation = ops.implementation
_dispatch_modes = torch._C._len_torch_dispatch_stack
_overrides_off = torch._C.DisableTorchFunctionSubclass
_linear = F.linear


def own_memory(y: Tensor) -> Tensor:
    """``y`` as a node's output: a view (``F.linear`` reshapes a matrix) autograd would let nobody change in place."""
    return y.detach() if y._is_view() else y


def changed(entries: SelectedEntries) -> RuntimeError:
    """What torch says when a weight that a node needs was changed in between."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{entries.name} was changed between the forward and the backward pass"
    )


# ------------------------------------------------------------------------------------------------ F.linear


class _Linear(torch.autograd.Function):
    """``F.linear`` by a whole weight of plain tensors, with as little as possible between autograd and the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, seen: Seen, kept: Kept) -> Tensor:
        if kept is None or type(kept) is Tensor:
            ctx.save_for_backward(x if kept is None else kept)
            kept = kept is None
        ctx.of = seen, kept, seen.weight._version  # at once: each attribute of a node costs
        return own_memory(_linear(x, seen.weight, bias))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if _gradients_enabled() or type(gy) is not Tensor or _dispatch_modes():
            return _linear_in_ops(ctx, gy)
        wants_x, _, wants_bias, _, _ = ctx.needs_input_grad
        seen, kept, version = ctx.of
        weight, how, csr = seen.weight, None, seen.whole
        backend = _implementation("sampled_grad", gy.device)
        if type(kept) is bool:
            (x,) = ctx.saved_tensors  # may run a forward pass again (checkpointing): overrides are on
            if not kept:
                csr = seen.part
        else:
            x, how = kept_numbers(kept)
            if not backend.RECOMPUTES or not suits_kernel(x, how):
                x, how, csr = computed_again(kept, seen.distinct, x.dim() - 1, gy.dtype), None, seen.part
        with _overrides_off():
            if weight._version != version:
                raise changed(seen.entries)
            grad, bias = backend.linear_gradients(gy, x, csr, wants_bias, how)
            if not wants_x:
                return None, grad, bias, None, None
            if weight.dtype is not gy.dtype:
                weight = weight.to(gy.dtype)
            return gy.matmul(weight), grad, bias, None, None


# Without torch.autograd.Function.apply's own look for functorch, which was looked for already.
_apply_linear = super(torch.autograd.Function, _Linear).apply
# The engine asks a node for `apply`, which would look for `backward` in every pass anew.
_Linear._backward_cls.apply = _Linear.backward  # type: ignore[attr-defined]


def tuned_linear(x: Tensor, bias: Tensor | None, seen: Seen) -> Tensor:
    """``F.linear`` of plain tensors in eager mode, outside of any transform, with overrides switched off."""
    kept = None if x.numel() <= SMALL else keep(x, seen.distinct, x.dim() - 1)
    result: Tensor = _apply_linear(x, seen.values, bias, seen, kept)
    return result


def _linear_in_ops(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    seen, kept, version = ctx.of
    e = seen.entries
    layer = Layer(F.linear, (), {}, LINEAR, seen.weight, e, None, gy.dim() - 1)
    shape = torch.Size((*gy.shape[:-1], e.layout.shape[1]))
    return *_gradients(ctx, gy, layer, seen.values, kept, version, shape, gy.shape[-1:]), None, None


# ------------------------------------------------------------------------------------------------ every kind


class Layer(NamedTuple):
    """A call of a function that multiplies by an attached weight, or by some of its rows.

    Attributes:
        function: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        kind: how it multiplies.
        weight: the argument that is the weight.
        entries: the chosen entries.
        rows: the half-open range of the matrix's rows that ``weight`` is, ``None`` for all.
        dim: the dimension of the input's channels, ``None`` where all of it is needed.
        row_dims: the dimensions of ``weight`` that count output neurons.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: WeightKind
    weight: Tensor
    entries: SelectedEntries
    rows: tuple[int, int] | None
    dim: int | None
    row_dims: tuple[int, ...] = (0,)

    def csr(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of the rows: ``row_offsets`` and columns."""
        if self.rows is None:
            return self.entries.row_offsets, columns
        return self.entries.row_offsets_of(self.rows), columns[self.entries.slice_of(self.rows)]

    def values_of(self, values: Tensor) -> Tensor:
        """The values of the rows."""
        return values if self.rows is None else values[self.entries.slice_of(self.rows)]

    def effective_weight(self, values: Tensor) -> Tensor:
        """The weight as a function of all its values, as the call was given it. It takes as much memory as the weight."""
        e, own = self.entries, self.entries.weight
        matrix = e.layout.matrix(own)
        chosen = e.selection.rows(), e.selection.columns.long()
        matrix = matrix.index_put(chosen, values.to(matrix.dtype))
        made: Normalisation | None = getattr(self.weight, "normal", None)
        normal = None if made is None else made.placed(e.layout, self.kind)
        weight = e.layout.unmatrix(matrix if normal is None else normal.of(matrix))
        part: Part | None = getattr(self.weight, "part", None)
        if part is None:
            return weight
        if weight.stride() != own.stride():
            order = sorted(range(own.dim()), key=own.stride, reverse=True)
            weight = weight.permute(order).contiguous().permute([order.index(d) for d in range(own.dim())])
        return part.of(weight)

    def spread(self, numbers: Tensor, row_offsets: Tensor, columns: Tensor, x: Tensor) -> Tensor:
        """One number for each chosen entry, in a matrix of zeros that multiplies ``x`` as the weight does the input."""
        shape = list(self.weight.shape)
        if self.dim is not None:  # of some channels, which the first of the dimensions that count columns counts
            shape[MatrixLayout(tuple(shape), self.row_dims).column_dims[0]] = x.shape[self.dim]
        layout = MatrixLayout(tuple(shape), self.row_dims)
        zeros = torch.zeros(layout.shape, dtype=numbers.dtype, device=numbers.device)
        rows = WeightSelection.trusted(layout, row_offsets, columns).rows()
        return layout.unmatrix(zeros.index_put((rows, columns.long()), numbers))


class _Layer(torch.autograd.Function):
    """Any function that multiplies by a weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part_values: Tensor, bias: Tensor | None, values: Tensor, layer: Layer, kept: Kept
    ) -> Tensor:
        ctx.layer = layer._replace(args=(), kwargs={})  # which hold the input
        if kept is None or isinstance(kept, Tensor):
            ctx.save_for_backward(x if kept is None else kept)
            kept = kept is None
        ctx.values, ctx.kept, ctx.version, ctx.shape = values, kept, layer.weight._version, x.shape
        ctx.bias_shape = None if bias is None else bias.shape
        return own_memory(layer.function(*layer.args, **layer.kwargs))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        found = _gradients(ctx, gy, ctx.layer, ctx.values, ctx.kept, ctx.version, ctx.shape, ctx.bias_shape)
        return *found, None, None, None


def tuned_layer(layer: Layer, x: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    """The result of any call that multiplies by an attached weight, with gradients for its values."""
    kept = keep(x, layer.entries.distinct, layer.dim)
    result: Tensor = _Layer.apply(x, layer.values_of(values), bias, values, layer, kept)
    return result


def _gradients(
    ctx: Any,
    gy: Tensor,
    layer: Layer,
    values: Tensor,
    kept: Any,
    version: int,
    shape: torch.Size,
    bias_shape: torch.Size | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of input, entries and bias. They can be differentiated again where gradients are enabled.

    Args:
        ctx: of the node.
        gy: the gradient of its output.
        layer: what the node computed.
        values: all values of the weight.
        kept: whether the node keeps its whole input, or only the needed channels; or the node that the input is from.
        version: of the weight in the forward pass.
        shape: of the input.
        bias_shape: of the bias, if there is one.
    """
    part = ctx.saved_tensors[0] if type(kept) is bool else None  # may run a forward pass again: overrides are on
    wants_x, _, wants_bias, *_ = ctx.needs_input_grad
    kind, e = layer.kind, layer.entries
    grad: Tensor
    with _overrides_off():
        if layer.weight._version != version:
            raise changed(e)
        # Where a kernel computes inputs again it takes no memory.
        if part is None and not (is_simulated(gy) and gy.device.type == "cpu"):
            part = computed_again(kept, e.distinct, layer.dim, gy.dtype)
        offsets, columns = layer.csr(e.selection.columns if kept is True else e.columns)
        gx = bias = None
        if part is None:
            grad, weight = gy.new_empty(columns.shape, dtype=torch.float32), layer.weight
        elif torch.is_grad_enabled():
            if e.is_sharded:
                raise RuntimeError(f"{e.name} is sharded: gradients of sharded models have no derivatives themselves")
            grad = _Sampled.apply(gy, part, offsets, columns, layer)
            weight = layer.effective_weight(values) if wants_x else layer.weight
        else:
            grad, weight = kind.sampled_gradient(gy, part, offsets, columns), layer.weight
        if wants_x:
            gx = kind.input_gradient(gy, weight, shape)
        if wants_bias and bias_shape is not None:
            bias = kind.bias_gradient(gy, bias_shape)
        return gx, grad, bias


class _Sampled(torch.autograd.Function):
    """The gradient of chosen entries, which can be differentiated any number of times: with a whole matrix, then."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(gy, x, row_offsets, columns)
        ctx.layer = layer
        return layer.kind.sampled_gradient(gy.detach(), x.detach(), row_offsets, columns)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, row_offsets, columns = ctx.saved_tensors
        kind = ctx.layer.kind
        weight = ctx.layer.spread(g.to(gy.dtype), row_offsets, columns, x)
        ggy = kind.multiply(x.to(gy.dtype) if x.is_floating_point() else x, weight)
        gx = kind.input_gradient(gy, weight, x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        return ggy, gx, None, None, None
