"""What the checks do on a GPU and nowhere else, on one that is pretended: no call that a GPU would refuse for its form."""

from contextlib import nullcontext
from types import SimpleNamespace

import peft  # noqa: F401  (before the GPU is pretended: it looks for one)
import pytest
import torch

from benchmarks.gpu_check import worker
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.shared.device_timing import Bench
from tests.support.pretended_gpu import pretended_gpu

# What numbers that are all zeros, and copies of tensors without numbers, cannot give.
OF_NO_NUMBERS = ("the loss of the replayed steps does not fall", "Couldn't swap")


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


class Stream:
    cuda_stream = 7

    def wait_stream(self, other):
        pass

    def record_event(self):
        return Event(enable_timing=True)

    def wait_event(self, event):
        pass


class Captures:
    """A graph that counts what was launched into it, and how often it was replayed."""

    replays = 0

    def __init__(self):
        self.captured = False

    def replay(self):
        assert self.captured
        Captures.replays += 1

    @staticmethod
    def capture(graph):
        graph.captured = True
        return nullcontext()


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu() as found, found.waiting(None), monkeypatch.context() as patch:
        for name, value in {
            "synchronize": lambda device=None: None,
            "Event": Event,
            "CUDAGraph": Captures,
            "graph": Captures.capture,
            "Stream": Stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device=None: Stream(),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 1 << 20,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
            "set_sync_debug_mode": lambda mode: None,
            "is_bf16_supported": lambda: True,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Captures, "replays", 0)
        yield found


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("op suite", "sanitizers", "compiled step")])
def test_every_check_goes_its_way(gpu, name):
    rows = []
    worker.run(name, torch.device("cuda"), True, rows.append)
    failed = [row["failed"] for row in rows if "failed" in row]
    assert not [why for why in failed if not any(known in why for known in OF_NO_NUMBERS)]
    assert len(failed) < len(rows)


def test_kernels_are_timed_in_graphs_on_more_than_the_cache_holds(gpu):
    rows = []
    assert worker.run("bandwidth of the kernels", torch.device("cuda"), True, rows.append)
    assert Captures.replays >= 2 * (len(rows) - 1)
    bench = Bench(torch.device("cuda"), 1, 1)
    assert [bench.copies(nbytes) for nbytes in (1 << 10, 1 << 18, 3 << 18, 1 << 23)] == [64, 16, 6, 2]
