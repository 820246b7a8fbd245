"""The ops on CUDA and ROCm GPUs, as Triton kernels; on CPU tensors too where ``TRITON_INTERPRET=1``.

Each file is one family of kernels on three floors: the backend's op on top, a launch function that chooses block sizes
below it, the jit kernels at the bottom. What an op means is in :mod:`fps_kernels.ops.reference`.
"""

from fps_kernels.ops.triton.agreement import agree_values_
from fps_kernels.ops.triton.column_norm import column_norm_
from fps_kernels.ops.triton.column_norm_conv2d import column_norm_conv2d_
from fps_kernels.ops.triton.counts import score_counts
from fps_kernels.ops.triton.gradients import linear_gradients, sampled_grad
from fps_kernels.ops.triton.gradients_conv2d import sampled_grad_conv2d
from fps_kernels.ops.triton.packing import pack_groups, unpack_groups
from fps_kernels.ops.triton.prepared import PreparedAdamW, PreparedAgreement
from fps_kernels.ops.triton.sparse_deltas import sparse_delta_matmul_
from fps_kernels.ops.triton.threshold import score_kth, score_select
from fps_kernels.ops.triton.topk import score_topk
from fps_kernels.ops.triton.updates import masked_adamw_, scatter_values_

RECOMPUTES = False  # inputs of linear_gradients

__all__ = [
    "PreparedAdamW",
    "PreparedAgreement",
    "agree_values_",
    "column_norm_",
    "column_norm_conv2d_",
    "linear_gradients",
    "masked_adamw_",
    "pack_groups",
    "sampled_grad",
    "sampled_grad_conv2d",
    "scatter_values_",
    "score_counts",
    "score_kth",
    "score_select",
    "score_topk",
    "sparse_delta_matmul_",
    "unpack_groups",
]
