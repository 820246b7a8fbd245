"""Choices by score without a score matrix: registration and checks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import (
    MAX_NNZ,
    check_device,
    check_dtype,
    check_shape,
    factor_matrix,
)
from fps_kernels.ops._dispatch import implementation


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
    matrices = _factor_matrices(weights, factors)
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


@custom_op("fps_kernels::score_counts", mutates_args=())
def score_counts(weights: Sequence[Tensor], factors: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores of each of many tensors lie above its threshold and are equal to it, without a score tensor.

    It is what several processes, each with some of the entries, find the k-th largest score of all by.

    Args:
        weights: ``n`` matrices ``[O, C]`` of any float dtypes and strides, at least one, all on one device.
        factors: for each its ``a``, ``[C]`` or ``[G, C]`` float32.
        thresholds: float32 ``[n]``; NaN ranks above every number.

    Returns:
        ``greater`` and ``equal`` int64 ``[n]``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or lists of different lengths.
    """
    matrices = _factor_matrices(weights, factors)
    check_dtype("thresholds", thresholds, torch.float32)
    check_device("thresholds", thresholds, weights[0].device)
    check_shape("thresholds", thresholds, (len(weights),))
    backend = implementation("score_counts", weights[0].device)
    result: tuple[Tensor, Tensor] = backend.score_counts(list(weights), matrices, thresholds.contiguous())
    return result


@score_counts.register_fake
def _(weights: Sequence[Tensor], factors: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
    counts = weights[0].new_empty((len(weights),), dtype=torch.int64)
    return counts, torch.empty_like(counts)


@custom_op("fps_kernels::score_select", mutates_args=())
def score_select(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """The ``nnz`` best entries of one tensor, as CSR: those above a threshold, then the first, row by row, equal to it.

    Args:
        W: ``[O, C]`` float32, bfloat16 or float16, any strides.
        a: ``[C]`` or ``[G, C]`` float32.
        threshold: float32 scalar tensor, from :func:`score_kth`.
        nnz: how many entries, from the counts of :func:`score_kth`; of a tensor that was alone there, its ``k``.

    Returns:
        ``row_offsets`` int32 ``[O + 1]`` and ``columns`` int32 ``[nnz]``.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, ``nnz`` over 2**31 - 1, fewer than lie above the threshold, or more than reach it
            (not checked on a GPU, where that would wait for the device).
    """
    a = factor_matrix(W, a)
    check_dtype("threshold", threshold, torch.float32)
    check_device("threshold", threshold, W.device)
    check_shape("threshold", threshold, ())
    if not 0 <= nnz <= min(W.numel(), MAX_NNZ):
        raise ValueError(f"nnz must be between 0 and {min(W.numel(), MAX_NNZ)}, got {nnz}")
    if W.numel() == 0:
        zeros = torch.zeros(W.shape[0] + 1, dtype=torch.int32, device=W.device)
        return zeros, torch.empty(0, dtype=torch.int32, device=W.device)
    result: tuple[Tensor, Tensor] = implementation("score_select", W.device).score_select(W, a, threshold, nnz)
    return result


@score_select.register_fake
def _(W: Tensor, a: Tensor, threshold: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    return W.new_empty((W.shape[0] + 1,), dtype=torch.int32), W.new_empty((nnz,), dtype=torch.int32)


def _factor_matrices(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    if len(weights) != len(factors):
        raise ValueError(f"factors must have one tensor per weight, got {len(factors)} for {len(weights)} weights")
    matrices = []
    for i, (W, a) in enumerate(zip(weights, factors, strict=True)):
        check_device(f"weights[{i}]", W, weights[0].device)
        matrices.append(factor_matrix(W, a, f"[{i}]"))
    return matrices
