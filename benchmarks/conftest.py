"""What pytest-benchmark saves of the machine beside its own: runs that differ in it should not be compared."""

from typing import Any

import torch

from fps_kernels.ops import native


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "isa": native.isa()}
