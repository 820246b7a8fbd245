"""A plugin for pytest: notes every kind of launch that interpreted kernels are asked for, one JSON line each.

    TRITON_INTERPRET=1 FPS_LAUNCHES=FILE pytest -p kernel_lab.noting tests/ops

The interpreter runs Python and checks no types. What it was asked to launch, :mod:`kernel_lab.every_launch` compiles. Each
process of the suite writes ``FILE.<name of the process>``.
"""

import json
import os
from pathlib import Path
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

_notes: set[str] = set()


def pytest_configure() -> None:
    run = InterpretedFunction.run

    def noted(self: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        _notes.add(note(self.fn.__module__, self.fn.__name__, positional, named))
        return run(self, *positional, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run = noted


def pytest_unconfigure() -> None:
    if _notes:
        process = os.environ.get("PYTEST_XDIST_WORKER", "main")
        Path(f"{os.environ['FPS_LAUNCHES']}.{process}").write_text("\n".join(sorted(_notes)) + "\n")


def note(module: str, kernel: str, positional: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What a launch is compiled for: the same text for launches that are compiled alike."""
    return json.dumps(
        {
            "module": module,
            "kernel": kernel,
            "positional": [_kind(value) for value in positional],
            "named": {name: _constant(value) for name, value in named.items()},
        }
    )


def _kind(value: Any) -> Any:
    """Of an argument: a pointer's dtype and alignment, a number that is compiled as this one is."""
    if isinstance(value, Tensor):
        return {"pointer": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        wide = 0 if -(2**31) <= value < 2**31 else 2**31
        return wide + (16 if value % 16 == 0 else 17)
    return value


def _constant(value: Any) -> Any:
    return {"dtype": value.name} if isinstance(value, tl.dtype) else value
