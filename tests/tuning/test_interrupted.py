"""A forward pass that the user interrupts (Ctrl-C in a notebook) ends without torch calling any hook at its end."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fps_kernels as fps
from tests.support.gradients import random_selection

hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Interrupting(nn.Module):
    """Raises what Ctrl-C raises, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.now:
            self.now = False
            raise KeyboardInterrupt
        return x


class Calling(nn.Module):
    """Calls itself, a little smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.seen: list[object] = []

    def forward(self, x: torch.Tensor, times: int = 2) -> torch.Tensor:
        x = self.fc(x)
        if times:
            x = self(x, times - 1)
        self.seen.append(hooks(False))
        return x


def interrupted(keep_bits: int | None = 8) -> tuple[nn.Module, fps.Tuner]:
    model = nn.Sequential(nn.Linear(16, 16), Interrupting(), nn.Linear(16, 4))
    tuner = fps.attach(model, random_selection(model, ["0.weight", "2.weight"], 0.3), keep_bits=keep_bits)
    model[1].now = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 16))
    return model, tuner


@pytest.mark.parametrize("keep_bits", [None, 8])
def test_the_next_pass_lets_values_and_weights_agree_again(keep_bits):
    model, tuner = interrupted(keep_bits)
    for value in tuner.parameters():
        value.data.add_(1)
    x = torch.randn(3, 16)
    y = model(x)
    assert torch.equal(y, model[2](model[0](x)))
    masks = tuner.selection.masks()
    for name, value in tuner.compact.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight[masks[name]], value.detach()), name
    assert hooks(False) is None


def test_hooks_that_came_later_stay():
    model, _ = interrupted()
    pair = (lambda t: t, lambda t: t)
    with saved_tensors_hooks(*pair):
        model(torch.randn(3, 16))
        assert hooks(False)[0] is pair[0]
    assert hooks(False) is None


def test_detaching_takes_the_hooks_along():
    _, tuner = interrupted()
    tuner.detach()
    assert hooks(False) is None


def test_a_module_that_calls_itself_is_not_taken_for_an_interrupted_one():
    model = Calling()
    tuner = fps.attach(model, random_selection(model, ["fc.weight"], 0.3), keep_bits=8)
    model(torch.randn(3, 16)).sum().backward()
    assert len(model.seen) == 3
    assert all(seen is not None and seen[0] is model.seen[0][0] for seen in model.seen)
    assert hooks(False) is None
    assert all(value.grad is not None for value in tuner.parameters())
