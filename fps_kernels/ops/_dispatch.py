"""Which backend serves which tensors: one rule, stated here, with no silent fallback.

* CUDA and ROCm tensors: ``triton``.
* CPU tensors: ``native`` (the C++ library in ``csrc/``); ``reference`` where the package was installed without a
  compiler, which is said once as a warning.
* Any other device: ``reference``, plain PyTorch.

``FPS_BACKEND`` or :func:`use_backend` overrides the rule, and an override that cannot be honoured raises.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("reference", "native", "triton")
OPS = (
    "column_norm_",
    "column_norm_conv2d_",
    "score_topk",
    "score_kth",
    "score_counts",
    "score_select",
    "sampled_grad",
    "sampled_grad_conv2d",
    "sparse_delta_matmul_",
    "scatter_values_",
    "masked_adamw_",
    "agree_values_",
    "pack_groups",
    "unpack_groups",
)

_override: str | None = None


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run on this machine or on these tensors."""


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@cache
def _environment_override() -> str | None:
    name = os.environ.get("FPS_BACKEND")
    return _validated(name, "the environment variable FPS_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on one backend.

    Args:
        name: ``"reference"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailableError: raised by the first op whose tensors that backend cannot serve.

    Example:
        >>> with fps.use_backend("reference"):
        ...     columns = fps.score_topk(W, a, k=1)
    """
    global _override
    previous, _override = _override, _validated(name, "use_backend(name)")
    try:
        yield
    finally:
        _override = previous


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors in this process (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _warn_no_native(reason: str) -> None:
    warnings.warn(
        f"fps_kernels runs its CPU ops on the slow reference backend: {reason}. "
        "Reinstall with a C++ compiler on the PATH to get the native kernels.",
        RuntimeWarning,
        stacklevel=2,
    )


def _why_unavailable(name: str, device: torch.device) -> str | None:
    """``None`` where backend ``name`` can serve tensors on ``device``, otherwise the reason it cannot."""
    if name == "native":
        if device.type != "cpu":
            return f"the native backend serves CPU tensors, these are on {device}"
        reason: str | None = _load("native").unavailable_reason()
        return reason
    if name == "triton":
        if not _triton_installed():
            return "triton is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"triton serves CUDA and ROCm tensors (CPU ones only under TRITON_INTERPRET=1), these are on {device}"
    return None


def backend_for(op: str, device: torch.device | str) -> str:
    """The name of the backend that serves an op on a device.

    Args:
        op: name of an op, such as ``"score_topk"``.
        device: where the tensors are.

    Returns:
        ``"reference"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: there is no such op.
        BackendUnavailableError: the backend chosen by ``FPS_BACKEND`` or :func:`use_backend` cannot serve the device.

    Example:
        >>> fps.backend_for("score_topk", "cpu")
        'native'
    """
    known = _found.get((op, device, _override))
    if known is not None:
        return known
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    found = _found[op, device, _override] = _backend_for(op, torch.device(device))
    return found


_found: dict[tuple[str, torch.device | str, str | None], str] = {}  # what was answered does not change in a process


def _backend_for(op: str, device: torch.device) -> str:
    chosen = _override or _environment_override()
    if chosen is not None:
        reason = _why_unavailable(chosen, device)
        if reason is not None:
            raise BackendUnavailableError(f"backend {chosen!r} was requested for {op}, but {reason}")
        return chosen
    if device.type == "cuda":
        if _triton_installed():
            return "triton"
        raise BackendUnavailableError(
            f"{op} on {device} needs triton, which is not installed; install it, or choose plain PyTorch with "
            "FPS_BACKEND=reference"
        )
    if device.type == "cpu":
        reason = _why_unavailable("native", device)
        if reason is None:
            return "native"
        _warn_no_native(reason)
    return "reference"


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module whose function ``op`` serves tensors on ``device``."""
    found = _modules.get((op, device, _override))
    if found is None:
        found = _modules[op, device, _override] = _load(backend_for(op, device))
    return found


_modules: dict[tuple[str, torch.device, str | None], ModuleType] = {}
