"""What the ops refuse: dtypes, shapes, devices and numbers, checked once for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fps_kernels.ops.records import AdamWTensors, Agreement, Convolution

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDS = (1.0, 2.0, float("inf"))
MAX_NNZ = 2**31 - 1


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_ord(ord: float) -> None:
    if ord not in ORDS:
        raise ValueError(f"ord must be 1, 2 or inf, got {ord}")


def row_views(x: Tensor) -> list[Tensor]:
    """``x`` ``[..., C]`` as 2-D views ``[M, C]`` that share its memory: one view wherever its strides allow it."""
    if x.dim() == 2:
        return [x]
    if x.dim() == 1:
        return [x.unsqueeze(0)]
    if x.numel() == 0:
        return []
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:  # the leading dimensions do not merge: go through the one that has the fewest slices
        fewest = min(range(x.dim() - 1), key=x.size)
        return [view for part in x.unbind(fewest) for view in row_views(part)]


def check_column_norm(x: Tensor, acc: Tensor, ord: float) -> None:
    check_float("x", x)
    check_dtype("acc", acc, torch.float64)
    check_device("acc", acc, x.device)
    check_ord(ord)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got a scalar")
    if not acc.is_contiguous():
        raise ValueError("acc must be contiguous")


def factor_matrix(W: Tensor, a: Tensor, where: str = "") -> Tensor:
    """``a`` as a contiguous ``[G, C]``, after every check of a weight and its column factors."""
    check_float(f"W{where}", W)
    check_dtype(f"a{where}", a, torch.float32)
    check_device(f"a{where}", a, W.device)
    if W.dim() != 2:
        raise ValueError(f"W{where} must be [O, C], got shape {list(W.shape)}")
    matrix = a.unsqueeze(0) if a.dim() == 1 else a
    if matrix.dim() != 2 or matrix.shape[1] != W.shape[1]:
        raise ValueError(f"a{where} must be [{W.shape[1]}] or [G, {W.shape[1]}], got shape {list(a.shape)}")
    if matrix.shape[0] < 1 or W.shape[0] % matrix.shape[0]:
        raise ValueError(f"a{where} has {matrix.shape[0]} groups, which do not divide the {W.shape[0]} rows of W{where}")
    return matrix.contiguous()


def check_selection(W: Tensor, row_offsets: Tensor, columns: Tensor, where: str = "") -> None:
    check_float(f"W{where}", W)
    if W.dim() != 2:
        raise ValueError(f"W{where} must be [O, C], got shape {list(W.shape)}")
    check_csr(W.shape[0], W.device, row_offsets, columns, where)


def check_csr(rows: int, device: torch.device, row_offsets: Tensor, columns: Tensor, where: str = "") -> None:
    for name, tensor in ((f"row_offsets{where}", row_offsets), (f"columns{where}", columns)):
        check_dtype(name, tensor, torch.int32)
        check_device(name, tensor, device)
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be one-dimensional and contiguous, got shape {list(tensor.shape)}")
    check_shape(f"row_offsets{where}", row_offsets, (rows + 1,))


def checked_convolution(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Convolution:
    """The geometry of a convolution of ``x``, after every check of it."""
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
    top, bottom, left, right = padding
    convolution = Convolution(
        (kernel_size[0], kernel_size[1]),
        (stride[0], stride[1]),
        (top, bottom, left, right),
        (dilation[0], dilation[1]),
        groups,
    )
    if min(convolution.output_size(x)) < 1:
        raise ValueError(f"kernel_size {list(kernel_size)} does not fit into the padded x of shape {list(x.shape)}")
    return convolution


def check_lengths(weights: Sequence[Tensor], **lists: Sequence[object]) -> None:
    for name, value in lists.items():
        if len(value) != len(weights):
            raise ValueError(f"{name} must have one item per weight, got {len(value)} for {len(weights)} weights")


def check_state(name: str, state: Tensor, device: torch.device) -> None:
    """Of the entries of one weight, in CSR order and full precision."""
    check_dtype(name, state, torch.float32)
    check_device(name, state, device)
    if not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_adamw_tensors(tensors: AdamWTensors, zero_grads: bool) -> None:
    """Of ``masked_adamw_``, whose lists have equal lengths."""
    device = tensors.weights[0].device
    for i, (W, grad, row_offsets, columns, master, *state, step, agreed) in enumerate(zip(*tensors, strict=True)):
        exp_avg, exp_avg_sq = state
        check_device(f"weights[{i}]", W, device)
        check_selection(W, row_offsets, columns, f"[{i}]")
        nnz = columns.numel()
        check_float(f"grads[{i}]", grad)
        check_device(f"grads[{i}]", grad, device)
        check_shape(f"grads[{i}]", grad, (nnz,) if grad.dim() == 1 else tuple(W.shape))
        if zero_grads and grad.dim() == 1 and not grad.is_contiguous():
            raise ValueError(f"grads[{i}] must be contiguous to be set to zero")
        if zero_grads and any(n > 1 and s == 0 for n, s in zip(grad.shape, grad.stride(), strict=True)):
            raise ValueError(f"grads[{i}] is expanded, its entries share memory: it cannot be set to zero")
        if master.numel() or W.dtype != torch.float32:
            check_shape(f"masters[{i}]", master, (nnz,))
        for name, state in (("masters", master), ("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
            check_state(f"{name}[{i}]", state, device)
        check_shape(f"exp_avgs[{i}]", exp_avg, (nnz,))
        check_shape(f"exp_avg_sqs[{i}]", exp_avg_sq, (nnz,))
        if agreed.numel():
            check_shape(f"agreed[{i}]", agreed, (nnz,))
            check_state(f"agreed[{i}]", agreed, device)
        check_dtype(f"steps[{i}]", step, torch.float32)
        check_device(f"steps[{i}]", step, device)
        check_shape(f"steps[{i}]", step, ())


def check_agreement(agreement: Agreement) -> None:
    """Of ``agree_values_``, whose lists have equal lengths."""
    device = agreement.weights[0].device
    for i, (W, row_offsets, columns, values, agreed) in enumerate(zip(*agreement, strict=True)):
        check_device(f"weights[{i}]", W, device)
        check_selection(W, row_offsets, columns, f"[{i}]")
        for name, state in (("values", values), ("agreed", agreed)):
            check_state(f"{name}[{i}]", state, device)
            check_shape(f"{name}[{i}]", state, (columns.numel(),))
