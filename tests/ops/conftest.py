"""The backends a test of an op goes through.

Triton decides at decoration whether it interprets, so without a GPU its lane is a process of its own:
``TRITON_INTERPRET=1 pytest tests/ops`` runs the Triton backend only, plain ``pytest`` all the others.
"""

from collections.abc import Iterator

import pytest
import torch

from fps_kernels import ops

# A process that interprets Triton has no use for the native kernels; the paths of Triton's kernels need a GPU or it.
# The GPU that tests pretend to have launches compiled kernels.
_NOT_INTERPRETED = ["test_native.py", "test_native_library.py", "test_tables.py", "test_waits.py"]
collect_ignore = _NOT_INTERPRETED if ops.interpreted() else []
if not ops.interpreted() and not torch.cuda.is_available():
    collect_ignore.append("test_triton_paths.py")


def _backends() -> list[str]:
    if ops.interpreted():
        return ["triton"]
    from fps_kernels.ops import native

    found = ["reference", *(f"native-{isa}" for isa in native.supported_isas())]
    return [*found, "triton"] if torch.cuda.is_available() else found


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test's ops on one backend (and, for ``native``, one instruction set)."""
    name, _, isa = request.param.partition("-")
    with ops.use_backend(name):
        if isa:
            from fps_kernels.ops import native

            with native.use_isa(isa):
                yield name
        else:
            yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where that backend's tensors live."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
