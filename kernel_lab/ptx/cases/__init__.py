"""Calls of all ops, small ones of every kind and large ones for their traffic, with the ops that they call."""

from collections.abc import Iterator

from fps_kernels.ops import reference
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import Agreement
from fps_kernels.ops.triton.gradients import sampled_grad_with_bias
from kernel_lab.ptx.cases import deltas, gradients, norms, packing, scores, updates
from kernel_lab.ptx.cases.case import SHORT, Case, Op, call, tensors_of

OPS = {
    name: Op(call(getattr(backend, name)), getattr(reference, name))
    for name in (
        "column_norm_",
        "column_norm_conv2d_",
        "score_topk",
        "score_kth",
        "score_counts",
        "score_select",
        "sampled_grad",
        "sampled_grad_conv2d",
        "masked_adamw_",
        "sparse_delta_matmul_",
        "scatter_values_",
        "unpack_groups",
    )
}
OPS |= {
    "pack_groups": Op(packing.pack_groups, packing.reference_pack_groups),
    "sampled_grad_with_bias": Op(call(sampled_grad_with_bias), gradients.sampled_grad_with_bias),
    "linear_gradients": Op(gradients.linear_gradients, gradients.reference_linear_gradients),
    "prepared_adamw": Op(updates.prepared_adamw, updates.reference_prepared_adamw),
    "agree_values_": Op(
        call(lambda *tensors: backend.agree_values_(Agreement(*tensors))),
        lambda *tensors: reference.agree_values_(Agreement(*tensors)),
    ),
    "prepared_agreement": Op(updates.prepared_agreement, lambda *tensors: reference.agree_values_(Agreement(*tensors))),
}


def cases() -> Iterator[Case]:
    """All of them."""
    for family in (norms, scores, gradients, deltas, updates, packing):
        yield from family.cases()


__all__ = ["OPS", "SHORT", "Case", "Op", "cases", "tensors_of"]
