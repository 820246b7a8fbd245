"""The entries that were chosen: of one weight, and of a model."""

from fps_kernels.selection.selection import Selection, WeightSelection

__all__ = ["Selection", "WeightSelection"]
