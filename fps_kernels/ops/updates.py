"""Writes to the selected entries of weights: registration and checks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import (
    check_adamw_tensors,
    check_agreement,
    check_device,
    check_dtype,
    check_float,
    check_lengths,
    check_selection,
    check_shape,
)
from fps_kernels.ops._dispatch import implementation
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement


@custom_op("fps_kernels::scatter_values_", mutates_args=("W",))
def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """``W[selection] = values``, rounded to the dtype of ``W``; nothing else in ``W`` is touched.

    Args:
        W: ``[O, C]`` float32, bfloat16 or float16, any strides without overlap, changed in place.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]``, trusted.
        values: ``[nnz]`` float32, bfloat16 or float16, contiguous.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or layout.
    """
    check_selection(W, row_offsets, columns)
    check_float("values", values)
    check_device("values", values, W.device)
    check_shape("values", values, (columns.numel(),))
    if columns.numel():
        implementation("scatter_values_", W.device).scatter_values_(W, row_offsets, columns, values.contiguous())


@custom_op("fps_kernels::masked_adamw_", mutates_args=("weights", "grads", "masters", "exp_avgs", "exp_avg_sqs", "steps"))
def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_offsets: Sequence[Tensor],
    columns: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lrs: Tensor,
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    zero_grads: bool,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) on the selected entries of many tensors, in one call.

    Gathers the gradients and values of the selected entries, updates the compact state, and writes the values back.
    Every other entry keeps its bits. Agrees with ``torch.optim.AdamW`` on the same entries to a relative 2e-6 of the
    size of the update, plus one unit in the last place of the value.

    Args:
        weights: ``n`` matrices ``[O, C]`` float32, bfloat16 or float16, strides without overlap, changed in place.
        grads: for each its gradient: dense ``[O, C]`` with any strides, or compact ``[nnz]`` in CSR order; any of the
            three dtypes.
        row_offsets: int32 ``[O + 1]`` each.
        columns: int32 ``[nnz]`` each, trusted; they need not ascend.
        masters: float32 ``[nnz]`` each: the selected values in full precision; ``[0]`` where a float32 weight is its
            own master. Changed in place.
        exp_avgs: first moments, float32 ``[nnz]`` each, changed in place.
        exp_avg_sqs: second moments, float32 ``[nnz]`` each, changed in place.
        steps: float32 scalar tensors: steps taken so far, incremented.
        lrs: float64 ``[n]`` learning rates, on the device of the weights.
        weight_decays: ``n`` decoupled decay coefficients.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        maximize: ascend instead of descend.
        grad_scale: float32 scalar tensor that gradients are divided by, or ``None``.
        found_inf: float32 scalar tensor; where it is not zero no value, state or step changes. Or ``None``.
        zero_grads: set the gradients of the selected entries to zero once they are read, also where ``found_inf`` is set.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or layout, or lists of different lengths.
    """
    tensors = AdamWTensors(
        list(weights),
        [g.contiguous() if g.dim() == 1 and not zero_grads else g for g in grads],
        list(row_offsets),
        list(columns),
        list(masters),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(steps),
        [torch.empty(0, device=lrs.device)] * len(weights),
    )
    check_lengths(**tensors._asdict(), weight_decays=weight_decays)
    if not weights:
        return
    device = weights[0].device
    check_dtype("lrs", lrs, torch.float64)
    check_device("lrs", lrs, device)
    check_shape("lrs", lrs, (len(weights),))
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None:
            check_dtype(name, scalar, torch.float32)
            check_device(name, scalar, device)
            if scalar.numel() != 1:
                raise ValueError(f"{name} must hold one number, got shape {list(scalar.shape)}")
    check_adamw_tensors(tensors, zero_grads)
    numbers = list(weight_decays), beta1, beta2, eps, maximize, grad_scale, found_inf, zero_grads
    options = AdamWOptions(lrs.contiguous(), *numbers)
    implementation("masked_adamw_", device).masked_adamw_(tensors, options)


@custom_op("fps_kernels::agree_values_", mutates_args=("weights", "values", "agreed"))
def agree_values_(
    weights: Sequence[Tensor],
    row_offsets: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    agreed: Sequence[Tensor],
) -> None:
    """Lets values and weights, of which either may have been changed by anyone, agree again, in one call for many tensors.

    What is compared is content, bit by bit, so that NaN and -0.0 count. A value that differs from what was agreed on last
    goes into its weight, rounded to nearest even. Otherwise an entry of the weight that differs from what was agreed on,
    rounded, becomes the value. Both then count as agreed. What agrees already is not written to, nor is any other entry.

    Args:
        weights: ``n`` matrices ``[O, C]`` float32, bfloat16 or float16, strides without overlap, changed in place.
        row_offsets: int32 ``[O + 1]`` each.
        columns: int32 ``[nnz]`` each, trusted; they need not ascend.
        values: the selected values in full precision, float32 ``[nnz]`` each, changed in place.
        agreed: what both agreed on last, float32 ``[nnz]`` each, changed in place.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or layout, or lists of different lengths.
    """
    check_lengths(weights, row_offsets=row_offsets, columns=columns, values=values, agreed=agreed)
    if not weights:
        return
    agreement = Agreement(list(weights), list(row_offsets), list(columns), list(values), list(agreed))
    check_agreement(agreement)
    implementation("agree_values_", weights[0].device).agree_values_(agreement)
