"""Ops on many tensors that are called again and again, with their arguments checked and told to the kernel only once.

What a call of :func:`.masked_adamw_` or :func:`.agree_values_` costs the host is mostly the list of its tensors: each is
checked, and asked where it lies. A prepared form is asked once and keeps the addresses, and references to the memory there,
so that it stays whatever becomes of the tensors. It follows none of them: where one is given other memory (``p.data = ...``,
``.to``, ``requires_grad_`` apart), prepare anew. The backend is chosen when it is prepared. Version counters are not raised.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fps_kernels.ops._checks import check_adamw_tensors, check_agreement, check_lengths
from fps_kernels.ops._dispatch import implementation
from fps_kernels.ops.records import AdamWTensors, Agreement, PreparedAdamW, PreparedAgreement


def prepared_agreement(
    weights: Sequence[Tensor],
    row_offsets: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    agreed: Sequence[Tensor],
) -> PreparedAgreement:
    """:func:`.agree_values_` of these arguments, which are checked now: ``.run()`` for all of them, ``.run_one(i)`` for one.

    A CUDA graph may capture a run.

    Raises:
        TypeError: as the op.
        ValueError: as the op, or there is no weight.
    """
    check_lengths(weights, row_offsets=row_offsets, columns=columns, values=values, agreed=agreed)
    _check_any(weights)
    agreement = Agreement(*map(_memory, (weights, row_offsets, columns, values, agreed)))
    check_agreement(agreement)
    prepared: PreparedAgreement = implementation("agree_values_", weights[0].device).PreparedAgreement(agreement)
    return prepared


def prepared_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_offsets: Sequence[Tensor],
    columns: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    agreed: Sequence[Tensor] | None = None,
) -> PreparedAdamW:
    """:func:`.masked_adamw_` of these tensors, which are checked now; ``.run(grads, ...)`` takes what differs between steps.

    Gradients come and go: the ones given here are examples of their dtypes, shapes and strides, and are not kept. A CUDA
    graph may capture a run whose gradients and numbers are those of the run before. Where ``agreed`` has an item that is not
    empty, float32 ``[nnz]``, the step begins with :func:`.agree_values_` and notes there what it ends with. A step that is
    skipped may leave that for later.

    Raises:
        TypeError: as the op.
        ValueError: as the op with ``zero_grads``, or there is no weight.
    """
    _check_any(weights)
    if agreed is None:
        agreed = [torch.empty(0, device=weights[0].device)] * len(weights)
    lists = (weights, grads, row_offsets, columns, masters, exp_avgs, exp_avg_sqs, steps, agreed)
    tensors = AdamWTensors(*map(_memory, lists))
    check_lengths(**tensors._asdict())
    check_adamw_tensors(tensors, zero_grads=True)
    prepared: PreparedAdamW = implementation("masked_adamw_", weights[0].device).PreparedAdamW(tensors)
    return prepared


def _check_any(weights: Sequence[Tensor]) -> None:
    if not weights:
        raise ValueError("weights must not be empty: there is nothing to prepare")


def _memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Plain tensors on the same memory, which they keep, with version counters of their own."""
    with torch._C.DisableTorchFunctionSubclass():
        return [t.data for t in tensors]
