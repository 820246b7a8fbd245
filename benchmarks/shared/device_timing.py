"""Times on a GPU by events or from a graph, on a CPU by the clock; peak memory by the allocator, or by the live tensors."""

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

    @property
    def on_gpu(self) -> bool:
        """Whether there is something to wait for."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        if self.on_gpu:
            torch.cuda.synchronize()

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
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def of(self, run: Callable[[], object]) -> float:
        """Median milliseconds of one contestant."""
        return median(self.milliseconds({"it": run})["it"])

    def alone(self, make: Callable[[], Callable[[], object]], nbytes: int) -> float:
        """Milliseconds that the device takes for a call of small kernels, without the host and without the L2 cache.

        A launch takes the host longer than many a kernel runs. So the calls are captured in a CUDA graph, on as many sets of
        tensors as the L2 cache cannot hold, and replayed from it.

        Args:
            make: gives a call on tensors of its own.
            nbytes: of these tensors.
        """
        if not self.on_gpu:
            return self.of(make())
        calls = [make() for _ in range(self.copies(nbytes))]
        for run in calls:  # kernels are compiled, tables made
            run()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in calls:
                run()
        return self.of(graph.replay) / len(calls)

    def copies(self, nbytes: int) -> int:
        """Of tensors of so many bytes, until they are four times as many as the L2 cache holds; at most 64."""
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)
        return min(64, max(2, -(-4 * cache // nbytes)))

    def host_microseconds(self, run: Callable[[], object], calls: int) -> float:
        """Microseconds that the host takes for a call, without waiting for the device: the best of three times so many."""
        best = float("inf")
        for _ in range(self.warmup + 1):
            run()
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
        self.synchronize()
        return best

    def peak_bytes(self, run: Callable[[], object], existing: Sequence[Tensor | nn.Module]) -> int:
        """Most bytes at any time of a call, with what lived before: ``torch.cuda.max_memory_allocated``, or live tensors."""
        if not self.on_gpu:
            return measure(run, existing=existing).peak
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
