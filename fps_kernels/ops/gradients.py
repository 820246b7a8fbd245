"""Weight gradients at the selected entries only: registration and checks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import check_csr, check_device, check_float, check_shape, checked_convolution
from fps_kernels.ops._dispatch import implementation


@custom_op("fps_kernels::sampled_grad", mutates_args=())
def sampled_grad(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    """The gradient of a linear map's weight at its selected entries: ``g_ij = sum_m gy_mi * x_mj``.

    The dense gradient ``gy.T @ x`` never exists. Products and sums are float32 whatever the inputs; sums are taken over
    fixed chunks of rows in a fixed order, so that a result does not depend on the number of threads. Scratch memory is
    bounded, natively by 1 KiB per column of ``x`` that carries an entry (or 2 MiB if that is more and several threads run),
    80 KiB per thread, 24 bytes per column of ``x`` and, beyond 7,000 rows, 4 bytes per entry; on a GPU by 64 float32
    partial sums per entry. A GPU goes through every column of ``x``, selected or not: pass the columns that carry entries
    only, ``x[:, distinct]``, with ``columns`` renumbered.

    Args:
        gy: ``[..., O]`` float32, bfloat16 or float16, any strides: the gradient of the output.
        x: ``[..., C]`` float32, bfloat16 or float16, any strides, with the leading dimensions of ``gy``: the input.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]`` in ``[0, C)``, trusted; they need not ascend.

    Returns:
        ``[nnz]`` float32, in CSR order.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device.
    """
    check_float("gy", gy)
    check_float("x", x)
    check_device("x", x, gy.device)
    if gy.dim() < 1 or gy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"gy must be [..., O] and x [..., C] with the same leading dimensions, got shapes {list(gy.shape)} and "
            f"{list(x.shape)}"
        )
    check_csr(gy.shape[-1], gy.device, row_offsets, columns)
    if columns.numel() == 0 or gy.numel() == 0:
        return torch.zeros(columns.numel(), dtype=torch.float32, device=gy.device)
    result: Tensor = implementation("sampled_grad", gy.device).sampled_grad(
        gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1]), row_offsets, columns
    )
    return result


@sampled_grad.register_fake
def _(gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
    return gy.new_empty((columns.shape[0],), dtype=torch.float32)


@custom_op("fps_kernels::sampled_grad_conv2d", mutates_args=())
def sampled_grad_conv2d(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """:func:`sampled_grad` of a 2-D convolution's weight ``[O, C_in / groups * kh * kw]``, without unfolding its input.

    Column ``j = (c * kh + u) * kw + v`` of output channel ``o`` is the weight entry ``[o, c, u, v]``.

    Args:
        gy: ``[B, O, H_out, W_out]`` float32, bfloat16 or float16, any strides: the gradient of the output.
        x: ``[B, C_in, H, W]`` float32, bfloat16 or float16, any strides (channels-last included): the input.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]`` in ``[0, C_in / groups * kh * kw)``, trusted; they need not ascend.
        kernel_size: ``(kh, kw)``.
        stride: ``(vertical, horizontal)``.
        padding: zeros around the image: ``(top, bottom, left, right)``.
        dilation: ``(vertical, horizontal)``.
        groups: number of groups, divides ``C_in`` and ``O``.

    Returns:
        ``[nnz]`` float32, in CSR order.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or number, or a kernel larger than the padded image.
    """
    check_float("gy", gy)
    check_float("x", x)
    check_device("x", x, gy.device)
    convolution = checked_convolution(x, kernel_size, stride, padding, dilation, groups)
    if gy.dim() != 4:
        raise ValueError(f"gy must be [B, O, H_out, W_out], got shape {list(gy.shape)}")
    check_shape("gy", gy, (x.shape[0], gy.shape[1], *convolution.output_size(x)))
    if gy.shape[1] % groups:
        raise ValueError(f"groups must divide the {gy.shape[1]} channels of gy, got {groups}")
    check_csr(gy.shape[1], gy.device, row_offsets, columns)
    if columns.numel() == 0 or gy.numel() == 0:
        return torch.zeros(columns.numel(), dtype=torch.float32, device=gy.device)
    result: Tensor = implementation("sampled_grad_conv2d", gy.device).sampled_grad_conv2d(
        gy, x, row_offsets, columns, convolution
    )
    return result


@sampled_grad_conv2d.register_fake
def _(
    gy: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return gy.new_empty((columns.shape[0],), dtype=torch.float32)
