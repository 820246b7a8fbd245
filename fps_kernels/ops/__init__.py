"""Every op's signature and contract, once: checked here, described to ``torch.library`` here, run by a backend.

The registered ops (``torch.ops.fps_kernels.*``) do all dtype, shape and device checks in this file, so that a backend
receives only arguments it may trust. Shapes: ``W`` ``[O, C]`` with any strides, ``a`` ``[C]`` or ``[G, C]`` where ``G``
divides ``O``; a choice is CSR by output row, ``row_offsets`` int32 ``[O + 1]`` and ``columns`` int32 ``[nnz]`` ascending
within each row. The ops that take a CSR trust its values: :class:`fps_kernels.Selection` validates them when it is made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import (
    FLOAT_DTYPES,
    MAX_NNZ,
    ORDS,
    check_column_norm,
    check_device,
    check_dtype,
    check_float,
    check_selection,
    check_shape,
    factor_matrix,
    row_views,
)
from fps_kernels.ops._dispatch import (
    BackendUnavailableError,
    backend_for,
    implementation,
    interpreted,
    use_backend,
)

__all__ = [
    "FLOAT_DTYPES",
    "MAX_NNZ",
    "ORDS",
    "BackendUnavailableError",
    "backend_for",
    "column_norm_",
    "column_norm_conv2d_",
    "interpreted",
    "masked_adamw_",
    "scatter_values_",
    "score_kth",
    "score_select",
    "score_topk",
    "use_backend",
]

# --------------------------------------------------------------------------------------------------------- norms


@custom_op("fps_kernels::column_norm_", mutates_args=("acc",))
def column_norm_(x: Tensor, acc: Tensor, ord: float) -> None:
    """Add the column norms of ``x`` to a running accumulator: ``acc[j] += sum_m |x_mj|^ord``.

    For ``ord=inf`` the accumulator keeps the running maximum. Neither ``|x|`` nor a float32 copy of ``x`` is made.
    Sums are carried in float64 over float32 tiles of at most 128 rows: relative error at most 1e-5. The result does
    not depend on the number of threads. NaN and infinity in ``x`` reach ``acc``.

    Args:
        x: ``[..., C]`` float32, bfloat16 or float16, any strides.
        acc: ``[C]`` float64, contiguous, changed in place.
        ord: 1, 2 or ``float("inf")``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ``ord``.
    """
    check_column_norm(x, acc, ord)
    check_shape("acc", acc, (x.shape[-1],))
    run = implementation("column_norm_", x.device).column_norm_
    for rows in row_views(x):
        if rows.numel():
            run(rows, acc, ord)


@column_norm_.register_fake
def _(x: Tensor, acc: Tensor, ord: float) -> None:
    return None


@custom_op("fps_kernels::column_norm_conv2d_", mutates_args=("acc",))
def column_norm_conv2d_(
    x: Tensor,
    acc: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    ord: float,
) -> None:
    """:func:`column_norm_` of the input of a 2-D convolution as its weight sees it, without unfolding it.

    Column ``j = (c * kh + u) * kw + v`` of group ``g`` is what weight entry ``[o, c, u, v]`` of an output channel ``o``
    of that group multiplies, over all output positions; padding counts as zeros.

    Args:
        x: ``[B, C_in, H, W]`` float32, bfloat16 or float16, any strides (channels-last included).
        acc: ``[groups, C_in / groups * kh * kw]`` float64, contiguous, changed in place.
        kernel_size: ``(kh, kw)``.
        stride: ``(vertical, horizontal)``.
        padding: zeros around the image: ``(top, bottom, left, right)``.
        dilation: ``(vertical, horizontal)``.
        groups: number of groups, divides ``C_in``.
        ord: 1, 2 or ``float("inf")``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or number, or a kernel larger than the padded image.
    """
    check_column_norm(x, acc, ord)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C_in, H, W], got shape {list(x.shape)}")
    for name, value, length in (
        ("kernel_size", kernel_size, 2),
        ("stride", stride, 2),
        ("padding", padding, 4),
        ("dilation", dilation, 2),
    ):
        least = 0 if name == "padding" else 1
        if len(value) != length or any(v < least for v in value):
            raise ValueError(f"{name} must be {length} integers of at least {least}, got {list(value)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    check_shape("acc", acc, (groups, x.shape[1] // groups * kernel_size[0] * kernel_size[1]))
    for size, before, after, kernel, spread in (
        (x.shape[2], padding[0], padding[1], kernel_size[0], dilation[0]),
        (x.shape[3], padding[2], padding[3], kernel_size[1], dilation[1]),
    ):
        if size + before + after < spread * (kernel - 1) + 1:
            raise ValueError(f"kernel_size {list(kernel_size)} does not fit into the padded x of shape {list(x.shape)}")
    if x.numel():
        implementation("column_norm_conv2d_", x.device).column_norm_conv2d_(
            x, acc, list(kernel_size), list(stride), list(padding), list(dilation), groups, ord
        )


@column_norm_conv2d_.register_fake
def _(
    x: Tensor,
    acc: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    ord: float,
) -> None:
    return None


# --------------------------------------------------------------------------------------------------------- scores


@custom_op("fps_kernels::score_topk", mutates_args=())
def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """The ``k`` largest scores ``|fl32(w_ij * a_j)|`` of every row, without a score matrix.

    NaN ranks above every number; equal scores go to the lower column. The choice is the same, bit for bit, on every
    backend.

    Args:
        W: ``[O, C]`` float32, bfloat16 or float16, any strides.
        a: ``[C]`` or ``[G, C]`` float32.
        k: entries per row, ``1 <= k <= C``.

    Returns:
        ``[O, k]`` int32 columns, ascending within a row.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ``k``.
    """
    a = factor_matrix(W, a)
    if not 1 <= k <= W.shape[1]:
        raise ValueError(f"k must be between 1 and the {W.shape[1]} columns of W, got {k}")
    if W.shape[0] == 0:
        return torch.empty(0, k, dtype=torch.int32, device=W.device)
    result: Tensor = implementation("score_topk", W.device).score_topk(W, a, k)
    return result


@score_topk.register_fake
def _(W: Tensor, a: Tensor, k: int) -> Tensor:
    return W.new_empty((W.shape[0], k), dtype=torch.int32)


@custom_op("fps_kernels::score_kth", mutates_args=())
def score_kth(weights: Sequence[Tensor], factors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The exact k-th largest score of many tensors together, without a score tensor or a sort.

    Args:
        weights: ``n`` matrices ``[O, C]`` of any float dtypes and strides, all on one device.
        factors: for each its ``a``, ``[C]`` or ``[G, C]`` float32.
        k: rank, from 1 (the largest) to the number of all entries.

    Returns:
        ``threshold`` float32 scalar tensor, the k-th largest score; ``greater`` and ``equal`` int64 ``[n]``: how many
        scores of each tensor lie above the threshold and are equal to it.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or ``k``, or lists of different lengths.
    """
    if len(weights) != len(factors):
        raise ValueError(f"factors must have one tensor per weight, got {len(factors)} for {len(weights)} weights")
    matrices = []
    for i, (W, a) in enumerate(zip(weights, factors, strict=True)):
        check_device(f"weights[{i}]", W, weights[0].device)
        matrices.append(factor_matrix(W, a, f"[{i}]"))
    total = sum(W.numel() for W in weights)
    if not 1 <= k <= total:
        raise ValueError(f"k must be between 1 and the {total} entries of all weights, got {k}")
    result: tuple[Tensor, Tensor, Tensor] = implementation("score_kth", weights[0].device).score_kth(
        list(weights), matrices, k
    )
    return result


@score_kth.register_fake
def _(weights: Sequence[Tensor], factors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = weights[0].new_empty((len(weights),), dtype=torch.int64)
    return weights[0].new_empty((), dtype=torch.float32), counts, torch.empty_like(counts)


@custom_op("fps_kernels::score_select", mutates_args=())
def score_select(W: Tensor, a: Tensor, threshold: Tensor, ties: int, nnz: int) -> tuple[Tensor, Tensor]:
    """The entries of one tensor above a threshold, and the first ``ties`` equal to it in row-major order, as CSR.

    Args:
        W: ``[O, C]`` float32, bfloat16 or float16, any strides.
        a: ``[C]`` or ``[G, C]`` float32.
        threshold: float32 scalar tensor, from :func:`score_kth`.
        ties: how many entries equal to the threshold to take.
        nnz: the number of entries that this chooses, from the counts of :func:`score_kth`.

    Returns:
        ``row_offsets`` int32 ``[O + 1]`` and ``columns`` int32 ``[nnz]``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, ``nnz`` over 2**31 - 1, or an ``nnz`` that is not what is chosen
            (not checked on a GPU, where that would wait for the device).
    """
    a = factor_matrix(W, a)
    check_dtype("threshold", threshold, torch.float32)
    check_device("threshold", threshold, W.device)
    check_shape("threshold", threshold, ())
    if not 0 <= ties <= nnz <= min(W.numel(), MAX_NNZ):
        raise ValueError(
            f"ties and nnz must satisfy 0 <= ties <= nnz <= {min(W.numel(), MAX_NNZ)}, got ties={ties}, nnz={nnz}"
        )
    if W.numel() == 0:
        zeros = torch.zeros(W.shape[0] + 1, dtype=torch.int32, device=W.device)
        return zeros, torch.empty(0, dtype=torch.int32, device=W.device)
    result: tuple[Tensor, Tensor] = implementation("score_select", W.device).score_select(W, a, threshold, ties, nnz)
    return result


@score_select.register_fake
def _(W: Tensor, a: Tensor, threshold: Tensor, ties: int, nnz: int) -> tuple[Tensor, Tensor]:
    return W.new_empty((W.shape[0] + 1,), dtype=torch.int32), W.new_empty((nnz,), dtype=torch.int32)


# --------------------------------------------------------------------------------------------------------- updates


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


@scatter_values_.register_fake
def _(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    return None


@custom_op("fps_kernels::masked_adamw_", mutates_args=("weights", "masters", "exp_avgs", "exp_avg_sqs", "steps"))
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
        found_inf: float32 scalar tensor; where it is not zero nothing changes, steps included. Or ``None``.

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
    implementation("masked_adamw_", device).masked_adamw_(
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
    )


@masked_adamw_.register_fake
def _(
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
) -> None:
    return None
