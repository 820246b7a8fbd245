"""The entries that were chosen: of one weight, and of a model."""

from fps_kernels.selection.selection import Selection
from fps_kernels.selection.weight_selection import WeightSelection, row_offsets_of, uniform_row_offsets

__all__ = ["Selection", "WeightSelection", "row_offsets_of", "uniform_row_offsets"]
