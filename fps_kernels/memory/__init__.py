"""Peak memory: measured exactly, simulated for a model that fits nowhere here, and planned before anything is run."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fps_kernels.memory.measuring import MemoryReport, format_bytes, measure, simulated
    from fps_kernels.memory.planning import MemoryPlan, MethodCost, plan

__all__ = ["MemoryPlan", "MemoryReport", "MethodCost", "format_bytes", "measure", "plan", "simulated"]

_OF_PLANNING = ("MemoryPlan", "MethodCost", "plan")


def __getattr__(name: str) -> Any:  # imported when asked for: the names of the methods need no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{'planning' if name in _OF_PLANNING else 'measuring'}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
