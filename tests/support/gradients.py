"""Compact gradients beside the dense ones."""

import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.selection import Selection
from tests.support.tolerances import assert_sums_close


def random_selection(model: nn.Module, names: list[str], density: float = 0.2, dense: tuple[str, ...] = ()) -> Selection:
    masks = {name: torch.rand(model.get_parameter(name).shape) < density for name in names}
    return Selection.from_masks(masks, dense)


def dense_gradients(model: nn.Module, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients_match(tuner: fps.Tuner, dense: dict[str, torch.Tensor]) -> None:
    for name, values in tuner.compact.items():
        entries = tuner.selection[name]
        expected = entries.layout.matrix(dense[name])[entries.rows(), entries.columns.long()]
        assert_sums_close(values.grad, expected, name=name)
    for name, p in tuner.dense.items():
        assert_sums_close(p.grad, dense[name], name=name)
