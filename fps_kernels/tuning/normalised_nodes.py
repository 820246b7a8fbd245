"""A layer whose weight is normalised before it multiplies: the gradient of its chosen entries, without a dense one.

The gradient of an entry that is kept needs two sums over the dense gradient of its row (:mod:`..weights.normalised`). Both
are sums over samples of what the layer computes: the row's dense gradient times the row is the gradient of the output times
the output, and its sum is that with the output of a weight of ones.
"""

from typing import Any

import torch
from torch import Tensor

from fps_kernels.tuning.layer_nodes import Layer, changed, own_memory
from fps_kernels.weights.normalised import Normalisation

_overrides_off = torch._C.DisableTorchFunctionSubclass


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        layer: Layer,
        normal: Normalisation,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.normal = layer._replace(args=(), kwargs={}), normal
        ctx.version = layer.entries.weight._version
        ctx.bias_shape = None if bias is None else bias.shape
        return own_memory(layer.function(*layer.args, **layer.kwargs))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.layer.entries.name} is normalised before it multiplies: attach() has no second derivatives of that"
            )
        (x,) = ctx.saved_tensors
        wants_x, _, wants_bias, wants_gain, *_ = ctx.needs_input_grad
        layer, normal = ctx.layer, ctx.normal
        kind, e = layer.kind, layer.entries
        with _overrides_off():
            if e.weight._version != ctx.version:
                raise changed(e)
            matrix = e.layout.matrix(e.weight).float()
            z, scale = normal.centred(matrix)
            grad = kind.sampled_gradient(gy, x, e.row_offsets, e.selection.columns)
            normalised = e.layout.unmatrix(z).reshape(layer.weight.shape).to(gy.dtype)
            inputs = x.to(gy.dtype)
            rows, columns = e.selection.rows(), e.selection.columns.long()
            if not normal.step:
                products = kind.row_products(gy, kind.multiply(inputs, normalised))
            elif normal.is_of_kernel:
                products = kind.kernel_products(gy, inputs, normalised)
            else:  # what every channel of the input adds to the loss's change is the input times its gradient
                changes = inputs.float() * kind.input_gradient(gy, normalised, x.shape).float()
                products = changes.movedim(layer.dim, -1).flatten(0, -2).sum(0)
            place, sums = normal.place(rows, columns), None
            if normal.standardised:
                sums = kind.row_products(gy, kind.multiply(inputs, kind.sum_weight(normalised)))
            found = normal.gradient(grad, z[rows, columns], place, scale, sums, products, z.shape[1])
            gx = kind.input_gradient(gy, layer.weight, x.shape) if wants_x else None
            bias = kind.bias_gradient(gy, ctx.bias_shape) if wants_bias and ctx.bias_shape is not None else None
            gain = None
            if wants_gain and normal.gain is not None:
                gain = products.reshape(normal.gain.shape).to(normal.gain.dtype)
        return gx, found, bias, gain, None, None


def normalised_layer(layer: Layer, x: Tensor, bias: Tensor | None, values: Tensor, normal: Normalisation) -> Tensor:
    """The result of a call that multiplies by an attached weight which was normalised."""
    result: Tensor = _Normalised.apply(x, values, bias, normal.gain, layer, normal)
    return result
