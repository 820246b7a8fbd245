"""Column norms of activations: registration and checks."""

from collections.abc import Sequence

from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import (
    check_column_norm,
    check_shape,
    checked_convolution,
    row_views,
)
from fps_kernels.ops._dispatch import implementation


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
    convolution = checked_convolution(x, kernel_size, stride, padding, dilation, groups)
    check_shape("acc", acc, (groups, x.shape[1] // groups * kernel_size[0] * kernel_size[1]))
    if x.numel():
        implementation("column_norm_conv2d_", x.device).column_norm_conv2d_(x, acc, convolution, ord)
