"""How ``pytest benchmarks/`` runs, and what it saves of the machine beside what pytest-benchmark does."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fps_kernels.ops import native

# Threads that wait for each other on a busy machine measure the machine: up to a hundred times what one thread takes.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info |= {"torch": torch.__version__, "threads": THREADS, "isa": native.isa()}
