"""What every test relies on: a seed, poisoned allocations, one thread for each of several processes."""

import os
import random
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import settings

with torch.device("meta"):  # torch notes on first use which functions `with torch.device` redirects: the real ones
    torch.empty(0)

# Threads that wait for each other make small operations many times slower where processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

settings.register_profile("fixed", derandomize=True)
settings.register_profile("fresh", print_blob=True)
settings.load_profile("fresh" if os.environ.get("FPS_TEST_SEED") == "fresh" else "fixed")

# Where tests that take a device run: on the CPU, and on a GPU where there is one. FPS_TEST_DEVICES=cuda is that lane alone.
DEVICES = os.environ.get("FPS_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")

_REAL_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory requested by the package holds NaN (or a huge integer): a result that was never written shows."""

    def poisoned(real):
        def allocate(*args, **kwargs):
            tensor = real(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("fps_kernels") and tensor.device.type in ("cpu", "cuda") and type(tensor) is torch.Tensor:
                tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3)
            return tensor

        return allocate

    for name, real in _REAL_EMPTY.items():
        monkeypatch.setattr(torch, name, poisoned(real))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors lie. A test that takes it names no device itself."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a test: the same in every run, of its name, so that a suite's verdict is the same twice.

    ``FPS_TEST_SEED=fresh`` draws a new one for each test (``make soak``), ``FPS_TEST_SEED=123`` repeats one; it is printed
    with a failure.
    """
    wanted = os.environ.get("FPS_TEST_SEED", "")
    if wanted == "fresh":
        number = int.from_bytes(os.urandom(4), "little")
    else:
        number = int(wanted) if wanted else zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    request.node.user_properties.append(("seed", number))
    print(f"FPS_TEST_SEED={number}")
    return number
