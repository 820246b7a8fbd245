"""``agree_values_`` and ``masked_adamw_`` with tables that stay on the device: a run uploads what changed, and launches."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fps_kernels.ops import records
from fps_kernels.ops.records import AdamWTensors, Agreement, Gradients
from fps_kernels.ops.triton.agreement import agreement_fields, launch_agree_values
from fps_kernels.ops.triton.tables import OwnTable, map_values
from fps_kernels.ops.triton.updates import (
    changing_fields,
    launch_masked_adamw,
    program_blocks,
    rates_offset,
    tensor_fields,
)


class PreparedAgreement(records.PreparedAgreement):
    """A run is one launch."""

    def __init__(self, agreement: Agreement) -> None:
        self._held = agreement
        device = agreement.weights[0].device
        blocks = program_blocks(agreement.columns)
        with torch.cuda.device_of(agreement.weights[0]):
            self._table = OwnTable(agreement_fields(agreement), device)
            self._map = OwnTable(map_values(blocks), device)
        self._first = [0, *accumulate(count for _, count in blocks)]

    def run(self) -> None:
        self._launch(0, self._first[-1])

    def run_one(self, index: int) -> None:
        self._launch(self._first[index], self._first[index + 1])

    def _launch(self, first: int, last: int) -> None:
        with torch.cuda.device_of(self._held.weights[0]):
            launch_agree_values(self._table.read(), self._map.read(), first, last - first)


class PreparedAdamW(records.PreparedAdamW):
    """A run is one launch, after one copy to the device where a gradient has moved or a number has changed."""

    def __init__(self, tensors: AdamWTensors) -> None:
        super().__init__(tensors)
        self._device = tensors.weights[0].device
        with torch.cuda.device_of(tensors.weights[0]):
            self._table = OwnTable(tensor_fields(tensors), self._device)
            self._map = OwnTable(map_values(program_blocks(tensors.columns)), self._device)
        self._changing: OwnTable | None = None
        self._numbers: tuple[object, ...] = ()

    def run(
        self,
        grads: Gradients,
        lrs: Tensor | Sequence[float],
        weight_decays: Sequence[float],
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        zero_grads: bool,
    ) -> None:
        rates = None if isinstance(lrs, Tensor) else list(lrs)
        numbers = (rates, list(weight_decays), beta1, beta2, eps)
        with torch.cuda.device_of(self._held.weights[0]):
            moved = self._moved(grads)
            if self._changing is None or moved is not None or numbers != self._numbers:
                addresses = self._addresses if moved is None else moved
                values = changing_fields(addresses, weight_decays, (beta1, beta2, eps), rates or ())
                if self._changing is None:
                    self._changing = OwnTable(values, self._device)
                else:
                    self._changing.write(values)
                self._addresses, self._numbers = addresses, numbers
            changing = self._changing.read()
            if not isinstance(lrs, Tensor):
                lrs = changing[rates_offset(len(lrs)) :].view(torch.float64)
            launch_masked_adamw(
                self._table.read(),
                changing,
                self._map.read(),
                lrs,
                self._held.steps,
                maximize,
                grad_scale,
                found_inf,
                zero_grads,
            )
