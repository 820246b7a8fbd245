"""Every op's signature and contract, once: checked here, described to ``torch.library`` here, run by a backend.

The registered ops (``torch.ops.fps_kernels.*``) do all dtype, shape and device checks in the files of this folder, one
per family, so that a backend receives only arguments it may trust. Shapes: ``W`` ``[O, C]`` with any strides, ``a``
``[C]`` or ``[G, C]`` where ``G`` divides ``O``; a choice is CSR by output row, ``row_offsets`` int32 ``[O + 1]`` and
``columns`` int32 ``[nnz]`` ascending within each row. The ops that take a CSR trust its values:
:class:`fps_kernels.Selection` validates them when it is made.
"""

from fps_kernels.ops._checks import FLOAT_DTYPES, MAX_NNZ, ORDS
from fps_kernels.ops._dispatch import BackendUnavailableError, backend_for, implementation, interpreted, use_backend
from fps_kernels.ops.gradients import sampled_grad, sampled_grad_conv2d
from fps_kernels.ops.norms import column_norm_, column_norm_conv2d_
from fps_kernels.ops.packing import pack_groups, unpack_groups
from fps_kernels.ops.prepared import prepared_adamw, prepared_agreement
from fps_kernels.ops.recomputing import recomputed
from fps_kernels.ops.records import (
    GELU,
    GELU_TANH,
    LAYER_NORM,
    AdamWOptions,
    Convolution,
    Csr,
    PreparedAdamW,
    PreparedAgreement,
    Recomputed,
)
from fps_kernels.ops.scores import score_counts, score_kth, score_select, score_topk
from fps_kernels.ops.sparse_deltas import sparse_delta_matmul_
from fps_kernels.ops.updates import agree_values_, masked_adamw_, scatter_values_

__all__ = [
    "FLOAT_DTYPES",
    "GELU",
    "GELU_TANH",
    "LAYER_NORM",
    "MAX_NNZ",
    "ORDS",
    "AdamWOptions",
    "BackendUnavailableError",
    "Convolution",
    "Csr",
    "PreparedAdamW",
    "PreparedAgreement",
    "Recomputed",
    "agree_values_",
    "backend_for",
    "column_norm_",
    "column_norm_conv2d_",
    "implementation",
    "interpreted",
    "masked_adamw_",
    "pack_groups",
    "prepared_adamw",
    "prepared_agreement",
    "recomputed",
    "sampled_grad",
    "sampled_grad_conv2d",
    "scatter_values_",
    "score_counts",
    "score_kth",
    "score_select",
    "score_topk",
    "sparse_delta_matmul_",
    "unpack_groups",
    "use_backend",
]
