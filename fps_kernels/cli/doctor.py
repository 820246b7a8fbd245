"""``fps-kernels doctor``."""

import importlib.metadata
import platform

import typer

from fps_kernels._version import __version__
from fps_kernels.cli.config import Config
from fps_kernels.cli.options import Json
from fps_kernels.cli.output import print_json

NOT_INSTALLED = "not installed"
OTHER = "fps-kernels"  # in the index: a plugin of a Jupyter server


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _self_test(device: str) -> str:
    """Each family of kernels once, against plain torch."""
    import torch

    from fps_kernels import ops

    W, x = torch.randn(37, 65, device=device), torch.randn(50, 65, device=device)
    acc = torch.zeros(65, dtype=torch.float64, device=device)
    ops.column_norm_(x, acc, 1.0)
    torch.testing.assert_close(acc, x.double().abs().sum(0), rtol=1e-5, atol=0)
    columns = ops.score_topk(W, torch.ones(65, device=device), 3)
    expected = W.abs().topk(3).indices.sort().values
    torch.testing.assert_close(columns.long(), expected)
    row_offsets = torch.arange(38, dtype=torch.int32, device=device) * 3
    gy = torch.randn(50, 37, device=device)
    grad = ops.sampled_grad(gy, x, row_offsets, columns.flatten())
    torch.testing.assert_close(grad.view(37, 3), (gy.t() @ x).gather(1, expected), rtol=1e-4, atol=1e-4)
    return "passed"


def _other_distribution() -> str | None:
    """What to do about a distribution whose import package has the name of this one; ``None`` where it is not installed."""
    version = _version(OTHER)
    if version == NOT_INSTALLED:
        return None
    return (
        f"{OTHER} {version} is installed, another project whose import package is fps_kernels, too: each overwrites files "
        f"of the other; pip uninstall {OTHER}, then pip install --force-reinstall --no-deps fps-kernels-torch"
    )


def doctor(json: Json = False, config: Config = None) -> None:
    """Which kernels run here and why, versions, and a self-test. The exit code is 1 if the self-test fails.

    \b
    Example: fps-kernels doctor
    """
    import torch

    from fps_kernels import ops
    from fps_kernels.ops import native
    from fps_kernels.ops._dispatch import OPS

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    reason = native.unavailable_reason()
    found: dict[str, object] = {
        "versions": {"fps-kernels-torch": __version__}
        | {p: _version(p) for p in ("torch", "triton", "timm", "peft", "transformers")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "native library": f"instruction set {native.isa()}" if reason is None else reason,
        "backends": {device: {op: ops.backend_for(op, device) for op in OPS} for device in devices},
    }
    failed = False
    tests: dict[str, str] = {}
    for device in devices:
        try:
            tests[device] = _self_test(device)
        except (AssertionError, RuntimeError) as error:
            tests[device], failed = f"FAILED: {error}", True
    found["self-test"] = tests
    if conflict := _other_distribution():
        found["conflict"] = conflict
    if json:
        print_json(found)
    else:
        for key, value in found.items():
            if key == "backends":
                assert isinstance(value, dict)
                value = "; ".join(f"{device}: {', '.join(sorted(set(names.values())))}" for device, names in value.items())
            elif isinstance(value, dict):
                value = ", ".join(f"{name} {text}" for name, text in value.items())
            typer.echo(f"{key}: {value}")
    if failed:
        raise typer.Exit(1)
