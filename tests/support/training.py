"""Training small models, and looking at what moved."""

import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.selection import Selection
from tests.support.models import images

RATES = {"lr": 3e-3, "weight_decay": 0.1}


def selected(model: nn.Module, density: float = 0.1) -> Selection:
    first = next(model.parameters())
    return fps.select(model, [images().to(first.device, first.dtype)], budget=fps.PerTensor(density))


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)).float(), batch[1])


def train(model: nn.Module, optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def assert_only_selected_moved(model: nn.Module, before: dict[str, torch.Tensor], selection: Selection) -> None:
    masks = selection.masks()
    for name, p in model.named_parameters():
        moved = p != before[name]
        if name in masks:
            assert not moved[~masks[name]].any(), name
            assert moved[masks[name]].any(), name
        else:
            assert bool(moved.any()) == (name in selection.dense), name


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def selected_like(optimizer: fps.MaskedAdamW, model: nn.Module) -> Selection:
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: entries for p, entries in optimizer.selections().items()}
    partial = {n: e for n, e in found.items() if e.density < 1}
    return Selection(partial, tuple(n for n in found if n not in partial))


class MaskedByHand:
    """torch.optim.AdamW on copies of the chosen entries: what MaskedAdamW must equal."""

    def __init__(self, model: nn.Module, selection: Selection, **rates) -> None:
        self.model, self.masks = model, {**selection.masks()}
        for name in selection.dense:
            self.masks[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        self.values = {n: nn.Parameter(model.get_parameter(n).detach()[m].clone()) for n, m in self.masks.items()}
        self.inner = torch.optim.AdamW(self.values.values(), foreach=False, **rates)

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        for name, value in self.values.items():
            value.grad = self.model.get_parameter(name).grad[self.masks[name]]
        self.inner.step()
        with torch.no_grad():
            for name, value in self.values.items():
                self.model.get_parameter(name)[self.masks[name]] = value
