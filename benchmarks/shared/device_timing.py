"""Times on a GPU by events, on a CPU by the clock; peak memory by the allocator, or by the live tensors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from fps_kernels.memory import measure


@dataclass
class Bench:
    """How to measure on one device.

    Attributes:
        device: where the tensors are.
        rounds: of every contestant, after ``warmup`` that do not count.
        warmup: calls before, in which kernels are compiled.
    """

    device: torch.device
    rounds: int
    warmup: int

    def milliseconds(self, contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Milliseconds of every contestant in every round; they take turns, in an order that is turned around each time."""
        for run in contestants.values():
            for _ in range(self.warmup):
                run()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for i in range(self.rounds):
            for name, run in list(contestants.items())[:: 1 if i % 2 == 0 else -1]:
                times[name].append(self.once(run))
        return times

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def of(self, run: Callable[[], object]) -> float:
        """Median milliseconds of one contestant."""
        return median(self.milliseconds({"it": run})["it"])

    def peak_bytes(self, run: Callable[[], object], existing: Sequence[Tensor | nn.Module]) -> int:
        """Most bytes at any time of a call, with what lived before: ``torch.cuda.max_memory_allocated``, or live tensors."""
        if self.device.type != "cuda":
            return measure(run, existing=existing).peak
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
