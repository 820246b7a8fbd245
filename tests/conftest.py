"""What every test relies on: a fresh seed, poisoned allocations."""

import os
import sys

import pytest
import torch

with torch.device("meta"):  # torch notes on first use which functions `with torch.device` redirects: the real ones
    torch.empty(0)

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


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> int:
    """A new seed in every run, printed with a failure; ``FPS_TEST_SEED`` repeats one."""
    seed = int(os.environ.get("FPS_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    print(f"FPS_TEST_SEED={seed}")
    return seed
