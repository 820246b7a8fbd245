"""Weights whose order of dimensions allows no view as a matrix: kernels that write get one whose rows overlap.

Every entry has a place of its own in it, so that all must be as with a copy of the matrix that is put back.
"""

import pytest
import torch

from fps_kernels import ops
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import MatrixLayout

LAYOUTS = {
    "experts [E, C, O]": MatrixLayout((3, 7, 5), (0, 2)),
    "experts in one matrix": MatrixLayout((21, 5), (0, 2), 3),
    "a transposed convolution": MatrixLayout((7, 5, 3, 2), (1,)),
    "heads, last": MatrixLayout((3, 4, 6), (2,)),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> MatrixLayout:
    return request.param


def made(layout: MatrixLayout, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, WeightSelection]:
    weight = torch.randn(layout.parameter_shape).to(device, dtype)
    mask = torch.rand(layout.parameter_shape) < 0.3
    return weight, WeightSelection.from_flat(layout, layout.matrix(mask).flatten().nonzero().squeeze(1)).to(device)


def test_every_entry_has_its_place(layout, dtype, device):
    weight, entries = made(layout, dtype, device)
    view, columns = entries.in_memory(weight)
    matrix = layout.matrix(weight)
    assert torch.equal(view[entries.rows(), columns.long()], matrix[entries.rows(), entries.columns.long()])
    places = entries.rows() * view.stride(0) + columns * view.stride(1)
    assert places.unique().numel() == entries.nnz
    assert int(places.max()) < weight.numel()


def test_scattered_values(layout, dtype, device):
    weight, entries = made(layout, dtype, device)
    expected = layout.matrix(weight).clone()
    values = torch.randn(entries.nnz, device=device)
    expected[entries.rows(), entries.columns.long()] = values.to(dtype)
    view, columns = entries.in_memory(weight)
    ops.scatter_values_(view, entries.row_offsets, columns, values)
    assert torch.equal(weight, layout.unmatrix(expected))


def test_agreement(layout, dtype, device):
    weight, entries = made(layout, dtype, device)
    agreed = entries.of(weight).float()
    values = agreed.clone()
    values[::3] += 1
    expected = layout.matrix(weight).clone()
    rows, columns = entries.rows(), entries.columns.long()
    expected[rows, columns] = values.to(dtype)
    view, places = entries.in_memory(weight)
    ops.agree_values_([view], [entries.row_offsets], [places], [values], [agreed])
    assert torch.equal(weight, layout.unmatrix(expected))
    assert torch.equal(agreed, values)
