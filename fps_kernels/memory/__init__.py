"""Peak memory: measured exactly, simulated for a model that fits nowhere here, and planned before anything is run."""

from fps_kernels.memory.measuring import MemoryReport, format_bytes, measure, simulated
from fps_kernels.memory.planning import MemoryPlan, MethodCost, plan

__all__ = ["MemoryPlan", "MemoryReport", "MethodCost", "format_bytes", "measure", "plan", "simulated"]
