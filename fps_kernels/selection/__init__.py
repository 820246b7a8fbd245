"""The entries that were chosen: of one weight, and of a model."""

from fps_kernels.selection.selection import Selection
from fps_kernels.selection.weight_selection import WeightSelection

__all__ = ["Selection", "WeightSelection"]
