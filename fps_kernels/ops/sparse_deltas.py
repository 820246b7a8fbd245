"""A sparse change of a linear map beside the map itself: registration and checks."""

import torch
from torch import Tensor
from torch.library import custom_op

from fps_kernels.ops._checks import check_csr, check_device, check_dtype, check_float, check_shape
from fps_kernels.ops._dispatch import implementation


@custom_op("fps_kernels::sparse_delta_matmul_", mutates_args=("y",))
def sparse_delta_matmul_(
    y: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor, order: Tensor | None = None
) -> None:
    """``y += x @ D.T``, where ``D`` ``[O, C]`` is zero but for the given entries; a dense ``D`` never exists.

    Sums are float32 and added to ``y`` with one rounding, so that a ``D`` of zeros changes nothing. The gradient of ``x`` is
    the same op on the gradient of ``y``, with the entries of ``D.T``: their ``order`` among those of ``D`` lets both share
    ``values``.

    Args:
        y: ``[M, O]`` float32, bfloat16 or float16, any strides without overlap, changed in place.
        x: ``[M, C]`` float32, bfloat16 or float16, any strides.
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]`` in ``[0, C)``, trusted; they need not ascend.
        values: float32 ``[nnz]``, contiguous.
        order: int32 ``[nnz]``, trusted: entry ``e`` has the value ``values[order[e]]``; ``values[e]`` if not given.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device.
    """
    check_float("y", y)
    check_float("x", x)
    check_device("x", x, y.device)
    if y.dim() != 2 or x.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"y must be [M, O] and x [M, C] with as many rows, got shapes {list(y.shape)} and {list(x.shape)}")
    check_csr(y.shape[1], y.device, row_offsets, columns)
    for name, tensor, dtype in (("values", values, torch.float32), ("order", order, torch.int32)):
        if tensor is not None:
            check_dtype(name, tensor, dtype)
            check_device(name, tensor, y.device)
            check_shape(name, tensor, (columns.numel(),))
    if columns.numel() and y.numel():
        backend = implementation("sparse_delta_matmul_", y.device)
        order = None if order is None else order.contiguous()
        backend.sparse_delta_matmul_(y, x, row_offsets, columns, values.contiguous(), order)
