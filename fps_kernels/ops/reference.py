"""The definition of every op in plain PyTorch: short enough to check by eye, runs on any device.

Notation: ``W`` ``[O, C]`` is a weight matrix, ``a`` ``[G, C]`` holds one non-negative factor per column for each of
``G`` equal blocks of output rows (``G = 1`` for a linear layer, the number of groups for a convolution), and the score
of an entry is ``s_ij = |fl32(w_ij * a_gj)|``, one rounded float32 product. Arguments arrive validated.
"""

from typing import TypeVar

import torch
from torch import Tensor

from fps_kernels.ops import records
from fps_kernels.ops.recomputing import recomputed
from fps_kernels.ops.records import (
    AdamWOptions,
    AdamWTensors,
    Agreement,
    Convolution,
    Csr,
    Gradients,
    Recomputed,
)

Integers = TypeVar("Integers", Tensor, int)

RECOMPUTES = True  # inputs of linear_gradients
ROWS_PER_CHUNK = 1024  # bounds the scratch of the ops that go through rows in chunks
ENTRIES_PER_CHUNK = 1024


def scores(W: Tensor, a: Tensor) -> Tensor:
    """``s_ij`` ``[O, C]`` float32. The other backends compute these entries but never store them."""
    per_row = a.repeat_interleave(W.shape[0] // a.shape[0], dim=0) if a.shape[0] > 1 else a
    return (W.float() * per_row).abs_()


def column_norm_(x: Tensor, acc: Tensor, ord: float) -> None:
    """``acc[j] += sum_m |x_mj|^ord``, or ``acc[j] = max(acc[j], max_m |x_mj|)`` for ``ord = inf``."""
    for rows in torch.split(x, ROWS_PER_CHUNK):
        magnitude = rows.double().abs_()
        if ord == float("inf"):
            if rows.shape[0]:
                torch.maximum(acc, magnitude.amax(0), out=acc)
        else:
            acc += (magnitude if ord == 1 else magnitude.square_()).sum(0)


def column_norm_conv2d_(
    x: Tensor,
    acc: Tensor,
    convolution: Convolution,
    ord: float,
) -> None:
    """:func:`column_norm_` of the unfolded ``x`` ``[B, C_in, H, W]`` into ``acc`` ``[groups, C_in/groups * kh * kw]``."""
    for image in torch.split(x, 1):  # one image at a time bounds the unfolded copy
        column_norm_(_unfolded(image.double(), convolution), acc.view(-1), ord)


def _unfolded(image: Tensor, convolution: Convolution) -> Tensor:
    """What the weight multiplies in one image ``[1, C_in, H, W]``: ``[positions, C_in * kh * kw]``."""
    kernel_size, stride, (top, bottom, left, right), dilation, _ = convolution
    padded = torch.nn.functional.pad(image, (left, right, top, bottom))
    return torch.nn.functional.unfold(padded, kernel_size, dilation=dilation, stride=stride)[0].t()


def score_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """Per row the columns of the ``k`` largest scores ``[O, k]`` int32 ascending; ties go to the lower column."""
    columns = torch.empty(W.shape[0], k, dtype=torch.int32, device=W.device)
    per_row = a.repeat_interleave(W.shape[0] // a.shape[0], dim=0) if a.shape[0] > 1 else a.expand(W.shape[0], -1)
    for start in range(0, W.shape[0], ROWS_PER_CHUNK):
        stop = start + ROWS_PER_CHUNK
        s = (W[start:stop].float() * per_row[start:stop]).abs_()
        order = s.argsort(dim=1, descending=True, stable=True)[:, :k]
        columns[start:stop] = order.sort(dim=1).values
    return columns


def score_kth(weights: list[Tensor], factors: list[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest score of all tensors together, and per tensor how many scores lie above it and are equal to it."""
    flat = torch.cat([scores(W, a).flatten() for W, a in zip(weights, factors, strict=True)])
    threshold = flat.sort(descending=True).values[k - 1].clone()
    greater = [_above(scores(W, a), threshold).sum() for W, a in zip(weights, factors, strict=True)]
    equal = [_same(scores(W, a), threshold).sum() for W, a in zip(weights, factors, strict=True)]
    return threshold, torch.stack(greater), torch.stack(equal)


def score_counts(weights: list[Tensor], factors: list[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Per tensor how many scores lie above its threshold and are equal to it."""
    every = [scores(W, a) for W, a in zip(weights, factors, strict=True)]
    greater = [_above(s, t).sum() for s, t in zip(every, thresholds, strict=True)]
    equal = [_same(s, t).sum() for s, t in zip(every, thresholds, strict=True)]
    return torch.stack(greater), torch.stack(equal)


def score_select(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """CSR of the entries whose score is above ``threshold``, and of the first (row by row) equal to it: ``nnz`` in all."""
    s = scores(W, a)
    above, equal = _above(s, threshold), _same(s, threshold)
    chosen = above | (equal & (equal.flatten().cumsum(0).view_as(s) <= nnz - above.sum()))
    row_offsets = torch.zeros(W.shape[0] + 1, dtype=torch.int32, device=W.device)
    row_offsets[1:] = chosen.sum(1).cumsum(0)
    columns = chosen.nonzero()[:, 1].int()
    if columns.numel() != nnz:
        raise ValueError(
            f"nnz must be what the threshold divides, {int(above.sum())} to {int((above | equal).sum())}, got {nnz}"
        )
    return row_offsets, columns


def _above(s: Tensor, threshold: Tensor) -> Tensor:
    return (s > threshold) | (s.isnan() & ~threshold.isnan())  # NaN ranks above every number, as in torch.sort


def _same(s: Tensor, threshold: Tensor) -> Tensor:
    return (s == threshold) | (s.isnan() & threshold.isnan())


def entry_rows(row_offsets: Tensor) -> Tensor:
    """The row of each CSR entry ``[nnz]`` int64."""
    lengths = row_offsets.diff().long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def sampled_grad(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """``g_e = sum_m gy[m, row_e] * x[m, column_e]`` ``[nnz]`` float32 of ``gy`` ``[M, O]`` and ``x`` ``[M, C]``."""
    grad = torch.zeros(columns.numel(), dtype=torch.float64, device=gy.device)
    entries = ENTRIES_PER_CHUNK
    for row, column, part in zip(
        entry_rows(row_offsets).split(entries), columns.long().split(entries), grad.split(entries), strict=True
    ):
        for gy_rows, x_rows in zip(gy.split(ROWS_PER_CHUNK), x.split(ROWS_PER_CHUNK), strict=True):
            part += (gy_rows[:, row].double() * x_rows[:, column].double()).sum(0)
    return grad.float()


def linear_gradients(
    gy: Tensor, x: Tensor, csr: Csr, wants_bias: bool, how: Recomputed | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`sampled_grad` of ``gy`` ``[..., O]`` and ``x`` ``[..., C]``, or what is computed from it; and ``gy``'s sum."""
    if how is not None:
        x = recomputed(x.float(), how)
    rows = gy.reshape(-1, gy.shape[-1])
    grad = sampled_grad(rows, x.reshape(-1, x.shape[-1]), csr.row_offsets, csr.columns)
    return grad, rows.sum(0) if wants_bias else None


def sampled_grad_conv2d(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    convolution: Convolution,
) -> Tensor:
    """:func:`sampled_grad` of ``gy`` ``[B, O, H_out, W_out]`` and the unfolded ``x`` ``[B, C_in, H, W]``."""
    kernel_size, groups = convolution.kernel_size, convolution.groups
    per_group = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    group = entry_rows(row_offsets) // (gy.shape[1] // groups)
    unfolded_columns = (group * per_group + columns).int()
    grad = torch.zeros(columns.numel(), dtype=torch.float64, device=gy.device)
    for gy_image, image in zip(gy.split(1), x.split(1), strict=True):  # one image at a time bounds the unfolded copy
        unfolded = _unfolded(image.float(), convolution)
        grad += sampled_grad(gy_image[0].flatten(1).t(), unfolded, row_offsets, unfolded_columns)
    return grad.float()


def sparse_delta_matmul_(
    y: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, order: Tensor | None
) -> None:
    """``y += x @ D.T`` of ``y`` ``[M, O]``, ``x`` ``[M, C]`` and the entries of ``D`` ``[O, C]``, with one rounding."""
    values = values if order is None else values[order.long()]
    delta = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64, device=y.device)
    delta.index_put_((entry_rows(row_offsets), columns.long()), values.double(), accumulate=True)
    for y_rows, x_rows in zip(y.split(ROWS_PER_CHUNK), x.split(ROWS_PER_CHUNK), strict=True):
        y_rows.copy_(y_rows.double() + (x_rows.double() @ delta.t()).float().double())


def scatter_values_(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> None:
    """``W[selection] = values``, rounded to the dtype of ``W``."""
    W.index_put_((entry_rows(row_offsets), columns.long()), values.to(W.dtype))


def masked_adamw_(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on the selected entries; no value changes where ``found_inf`` is set."""
    weights, grads, row_offsets, columns, masters, exp_avgs, exp_avg_sqs, steps, _ = tensors
    if options.found_inf is not None and bool(options.found_inf):
        if options.zero_grads:
            _zero(grads, row_offsets, columns)
        return
    for i, W in enumerate(weights):
        steps[i] += 1
        count, lr = float(steps[i]), float(options.lrs[i])
        rows, cols = entry_rows(row_offsets[i]), columns[i].long()
        grad = (grads[i] if grads[i].dim() == 1 else grads[i][rows, cols]).float()
        if options.grad_scale is not None:
            grad = grad / options.grad_scale
        if options.maximize:
            grad = -grad
        value = masters[i] if masters[i].numel() else W[rows, cols]
        value = value * (1 - lr * options.weight_decays[i])
        exp_avgs[i].lerp_(grad, 1 - options.beta1)
        exp_avg_sqs[i].mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
        denominator = (exp_avg_sqs[i].sqrt() / (1 - options.beta2**count) ** 0.5).add_(options.eps)
        value.addcdiv_(exp_avgs[i], denominator, value=-lr / (1 - options.beta1**count))
        if masters[i].numel():
            masters[i].copy_(value)
        scatter_values_(W, row_offsets[i], columns[i], value)
    if options.zero_grads:
        _zero(grads, row_offsets, columns)


def _zero(grads: list[Tensor], row_offsets: list[Tensor], columns: list[Tensor]) -> None:
    for grad, offsets, cols in zip(grads, row_offsets, columns, strict=True):
        grad[... if grad.dim() == 1 else (entry_rows(offsets), cols.long())] = 0


def agree_values_(agreement: Agreement) -> None:
    """A value that is not what was agreed on goes into its weight; otherwise a weight that is not comes back from there."""
    for tensors in zip(*agreement, strict=True):
        _agree(*tensors)


def _agree(W: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, agreed: Tensor) -> None:
    rows, cols = entry_rows(row_offsets), columns.long()
    held = W[rows, cols]
    changed = _bits(values) != _bits(agreed)
    taken = (_bits(held) != _bits(agreed.to(W.dtype))) & ~changed
    W.index_put_((rows[changed], cols[changed]), values[changed].to(W.dtype))
    agreed[changed] = values[changed]
    values[taken] = held[taken].float()
    agreed[taken] = values[taken]


def _bits(x: Tensor) -> Tensor:
    """As integers, among which NaN is equal to itself and -0.0 is not 0.0."""
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


class PreparedAgreement(records.PreparedAgreement):
    """The op, again and again."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement

    def run(self) -> None:
        agree_values_(self._agreement)

    def run_one(self, index: int) -> None:
        _agree(*(tensors[index] for tensors in self._agreement))


class PreparedAdamW(records.PreparedAdamW):
    """The op, again and again. It needs the gradients themselves: their addresses are of no use to PyTorch."""

    def run(self, grads: Gradients, options: AdamWOptions) -> None:
        tensors = self._held._replace(grads=[g for g in grads if isinstance(g, Tensor)])
        if len(tensors.grads) != len(tensors.weights):
            raise TypeError("the reference backend needs the gradients, not their addresses")
        if (moved := self._moved(grads)) is not None:
            self._addresses = moved
        noted = [i for i, agreed in enumerate(tensors.agreed) if agreed.numel()]
        lists = tensors.weights, tensors.row_offsets, tensors.columns, tensors.masters, tensors.agreed
        agree_values_(Agreement(*([tensor[i] for i in noted] for tensor in lists)))
        masked_adamw_(tensors, options)
        for agreed, master in zip(tensors.agreed, tensors.masters, strict=True):
            if agreed.numel():
                agreed.copy_(master)


# ------------------------------------------------------------------------------------------------ packed groups


def pack_groups(x: Tensor, bits: int, key: int | None) -> tuple[Tensor, Tensor]:
    """The codes of 32 numbers at a time and, of each group, its minimum and step; ``x`` in the order of its memory."""
    most = 2**bits - 1
    numbers = x.reshape(-1).float()
    n = numbers.numel()
    # The last group is filled up with what changes neither its minimum nor its largest number.
    groups = torch.cat([numbers, numbers[-1:].expand(-n % 32)]).view(-1, 32)
    minimum = _truncated(groups.amin(1) + 0.0, up=False)  # of two zeros, which minimum is taken is nobody's choice: no -0
    spread = groups.amax(1) - minimum
    step = _truncated((spread * (1 / torch.tensor(float(most)))).clamp_(min=2.0**-126), up=True)
    minimum = torch.where((groups - groups == 0).all(1) & spread.isfinite(), minimum, torch.nan)
    step = torch.where(minimum.isnan(), 0.0, step)
    if key is None:
        u: Tensor | float = 0.5
    else:
        u = _uniform(key, groups.numel(), x.device).view(-1, 32)
    scaled = (groups - minimum[:, None]) * (1 / step)[:, None] + u
    codes = scaled.nan_to_num(0.0).clamp(max=most).to(torch.uint8).view(-1)[:n]
    if bits == 4:
        padded = torch.cat([codes, codes.new_zeros(n % 2)]).view(-1, 2)
        codes = padded[:, 0] | padded[:, 1] << 4
    scales = torch.stack([minimum, step], 1).view(torch.int32) >> 16  # exact, and one NaN on every machine
    return codes.contiguous(), scales.short().view(torch.bfloat16)


def unpack_groups(codes: Tensor, scales: Tensor, out: Tensor, bits: int) -> None:
    """``out[i] = minimum + codes[i] * step``; ``out`` ``[n]`` is written."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).view(-1)
    n, largest = out.numel(), torch.finfo(out.dtype).max
    minimum, step = scales.float().repeat_interleave(32, dim=0)[:n].unbind(1)
    out.copy_((minimum + codes[:n] * step).clamp(-largest, largest))


def _truncated(x: Tensor, up: bool) -> Tensor:
    """Float32 numbers that bfloat16 holds: the largest not above ``x``, or the smallest not below it. Of NaN anything."""
    bits = x.contiguous().view(torch.int32)
    away = torch.full_like(bits, up) ^ (bits < 0).int()  # whether that is further from zero than ``x``
    return (bits + away * 0xFFFF & ~0xFFFF).view(torch.float32)


def _uniform(key: int, n: int, device: torch.device) -> Tensor:
    """``n`` numbers in [0, 1) on a grid of 2^-24: a hash of each position, modulo 2^32, and of a key below 2^32."""
    h = mixed(torch.arange(n, device=device) & 0xFFFFFFFF)
    h = mixed(h + key & 0xFFFFFFFF)
    return (h >> 8).float() * 2.0**-24


def mixed(h: Integers) -> Integers:
    """A permutation of 32-bit numbers in which every bit depends on every other: the finalizer of MurmurHash3."""
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16
