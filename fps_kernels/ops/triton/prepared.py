"""``agree_values_`` and ``masked_adamw_`` with tables that stay on the device: a run uploads what changed, and launches."""

from collections.abc import Hashable
from itertools import accumulate

import torch
from torch import Tensor

from fps_kernels.ops import records
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Gradients
from fps_kernels.ops.triton.agreement import agreement_fields, launch_agree_values
from fps_kernels.ops.triton.launching import Compiled
from fps_kernels.ops.triton.tables import OwnTable, map_values
from fps_kernels.ops.triton.updates import (
    changing_fields,
    launch_masked_adamw,
    program_blocks,
    rates_offset,
    step_blocks,
    tensor_fields,
)


class PreparedAgreement(records.PreparedAgreement):
    """A run is one launch."""

    def __init__(self, agreement: Agreement) -> None:
        self._held = agreement
        blocks, memory = program_blocks(agreement.columns), agreement.weights[0]
        with torch.cuda.device_of(memory):
            self._table = OwnTable(agreement_fields(agreement), memory)
            self._map = OwnTable(map_values(blocks), memory)
        self._first = [0, *accumulate(count for _, count in blocks)]
        self._compiled: Compiled | None = None

    def run(self) -> None:
        self._launch(0, self._first[-1])

    def run_one(self, index: int) -> None:
        self._launch(self._first[index], self._first[index + 1])

    def _launch(self, first: int, last: int) -> None:
        table, map_ = self._table.read(), self._map.read()
        if self._compiled is None:
            with torch.cuda.device_of(table):
                self._compiled = launch_agree_values(table, map_, first, last - first)
        elif last > first:
            self._compiled.launch((last - first, 1, 1), table.data_ptr(), map_.data_ptr(), first)


class PreparedAdamW(records.PreparedAdamW):
    """A run is one launch, after one copy to the device where a gradient has moved or a number has changed."""

    def __init__(self, tensors: AdamWTensors) -> None:
        super().__init__(tensors)
        memory = tensors.weights[0]
        with torch.cuda.device_of(memory):
            self._table = OwnTable(tensor_fields(tensors), memory)
            self._map = OwnTable(map_values(step_blocks(tensors.columns)), memory)
        self._compiled: dict[Hashable, Compiled] = {}
        self._changing: OwnTable | None = None
        self._with_rates = False
        self._numbers: tuple[object, ...] = ()

    def run(self, grads: Gradients, options: AdamWOptions) -> None:
        lrs, maximize, grad_scale, found_inf = options.lrs, options.maximize, options.grad_scale, options.found_inf
        self._write_changes(grads, options)
        assert self._changing is not None
        tables = self._table.read(), self._changing.read(), self._map.read()
        n = len(self._held.weights)
        rates = lrs.data_ptr() if isinstance(lrs, Tensor) else tables[1].data_ptr() + 8 * rates_offset(n)
        scale = None if grad_scale is None else grad_scale.data_ptr()
        skip = None if found_inf is None else found_inf.data_ptr()
        # All that it is compiled for: the tables are aligned.
        kind = maximize, options.zero_grads, rates % 16, scale and scale % 16, skip and skip % 16
        compiled = self._compiled.get(kind)
        if compiled is not None:
            table, changing, map_ = tables
            addresses = table.data_ptr(), changing.data_ptr(), map_.data_ptr(), rates, scale, skip
            compiled.launch((map_.shape[0], 1, 1), *addresses, n)
            return
        if not isinstance(lrs, Tensor):
            lrs = tables[1][rates_offset(n) :].view(torch.float64)
        with torch.cuda.device_of(tables[0]):
            compiled = launch_masked_adamw(*tables, lrs, maximize, grad_scale, found_inf, options.zero_grads)
        if compiled is not None:
            self._compiled[kind] = compiled

    def _write_changes(self, grads: Gradients, options: AdamWOptions) -> None:
        lrs, weight_decays, coefficients = options.lrs, options.weight_decays, options[2:5]
        rates = None if isinstance(lrs, Tensor) else list(lrs)
        numbers = (rates, list(weight_decays), *coefficients)
        moved = self._moved(grads)
        if self._changing is not None and moved is None and numbers == self._numbers:
            return
        addresses = self._addresses if moved is None else moved
        values = changing_fields(addresses, weight_decays, coefficients, rates or ())
        with torch.cuda.device_of(self._held.weights[0]):
            if self._changing is None or self._with_rates != (rates is not None):
                self._changing = OwnTable(values, self._held.weights[0])
                self._with_rates = rates is not None
            else:
                self._changing.write(values)
        self._addresses, self._numbers = addresses, numbers
