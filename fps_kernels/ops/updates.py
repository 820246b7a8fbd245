"""Writes to the selected entries of weights: registration and checks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import (
    check_device,
    check_dtype,
    check_float,
    check_selection,
    check_shape,
)
from fps_kernels.ops._dispatch import implementation
from fps_kernels.ops.records import AdamWStep


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
    lists = {
        "grads": grads,
        "row_offsets": row_offsets,
        "columns": columns,
        "masters": masters,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "weight_decays": weight_decays,
    }
    for name, value in lists.items():
        if len(value) != len(weights):
            raise ValueError(f"{name} must have one item per weight, got {len(value)} for {len(weights)} weights")
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
    for i, W in enumerate(weights):
        check_device(f"weights[{i}]", W, device)
        check_selection(W, row_offsets[i], columns[i], f"[{i}]")
        nnz = columns[i].numel()
        check_float(f"grads[{i}]", grads[i])
        check_device(f"grads[{i}]", grads[i], device)
        check_shape(f"grads[{i}]", grads[i], (nnz,) if grads[i].dim() == 1 else tuple(W.shape))
        if zero_grads and grads[i].dim() == 1 and not grads[i].is_contiguous():
            raise ValueError(f"grads[{i}] must be contiguous to be set to zero")
        if zero_grads and any(n > 1 and s == 0 for n, s in zip(grads[i].shape, grads[i].stride(), strict=True)):
            raise ValueError(f"grads[{i}] is expanded, its entries share memory: it cannot be set to zero")
        if masters[i].numel() or W.dtype != torch.float32:
            check_shape(f"masters[{i}]", masters[i], (nnz,))
        for name, state in (("masters", masters[i]), ("exp_avgs", exp_avgs[i]), ("exp_avg_sqs", exp_avg_sqs[i])):
            check_dtype(f"{name}[{i}]", state, torch.float32)
            check_device(f"{name}[{i}]", state, device)
            if not state.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous")
        check_shape(f"exp_avgs[{i}]", exp_avgs[i], (nnz,))
        check_shape(f"exp_avg_sqs[{i}]", exp_avg_sqs[i], (nnz,))
        check_dtype(f"steps[{i}]", steps[i], torch.float32)
        check_device(f"steps[{i}]", steps[i], device)
        check_shape(f"steps[{i}]", steps[i], ())
    step = AdamWStep(
        list(weights),
        [g.contiguous() if g.dim() == 1 else g for g in grads],
        list(row_offsets),
        list(columns),
        list(masters),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(steps),
        lrs.contiguous(),
        list(weight_decays),
        beta1,
        beta2,
        eps,
        maximize,
        grad_scale,
        found_inf,
        zero_grads,
    )
    implementation("masked_adamw_", device).masked_adamw_(step)
