"""A weight that lost its hold on the model is said so, by name, before a step moves nothing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps
from tests.support.gradients import random_selection

OPTIMIZERS = [torch.optim.SGD, fps.MaskedAdamW]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def attached(model: nn.Module) -> fps.Tuner:
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    dense = tuple(name for name, p in model.named_parameters() if p.dim() == 1)
    return fps.attach(model, random_selection(model, names, density=0.3, dense=dense))


# ------------------------------------------------------------------------------------------------ no gradient


class FusedLinear(torch.autograd.Function):
    """As layers that save memory do: torch hands its arguments over without asking their class."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        _, w = ctx.saved_tensors
        return g @ w, None, g.sum(0)


class Fused(nn.Linear):
    def forward(self, x):
        return FusedLinear.apply(x, self.weight, self.bias)


@torch.jit.script
def scripted_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w, b)


class Scripted(nn.Linear):
    def forward(self, x):
        return scripted_linear(x, self.weight, self.bias)


class Numbers(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.detach(), self.bias)


class Reentrant(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x.detach(), use_reentrant=True)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("layer", [Fused, Scripted, Numbers, Reentrant])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_values_that_get_no_gradient_are_named_once(make, layer):
    model = network()
    model[2] = layer(8, 8)
    tuner = attached(model)
    optimizer = make(tuner.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    ours = [str(w.message) for w in found if "gave no gradient" in str(w.message)]
    assert len(ours) == 1
    assert "2.weight" in ours[0]
    assert "4.weight" not in ours[0]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_warning_where_all_have_gradients_or_none(make):
    model = network()
    optimizer = make(attached(model).parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        for _ in range(2):
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_no_warning_by_optimizers_that_step_in_the_backward_pass():
    model = network()
    tuner = attached(model)
    optimizers = {p: fps.MaskedAdamW([p], lr=0.1) for p in tuner.parameters()}
    for p in tuner.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 6)).square().sum().backward()


# ------------------------------------------------------------------------------------------------ other parameters


def replace_weight(model: nn.Module) -> str:
    model[2].weight = nn.Parameter(torch.randn(8, 8))
    return "2.weight was replaced since attach"


def replace_module(model: nn.Module) -> str:
    model[2] = nn.Linear(8, 8)
    return "2.weight was replaced since attach"


def replace_head(model: nn.Module) -> str:
    """Only what is trained whole is another one: as ``reset_classifier`` and ``resize_token_embeddings`` do."""
    model[4].bias = nn.Parameter(torch.randn(3))
    return "4.bias was replaced since attach.* it is trained whole"


def replace_values(model: nn.Module) -> str:
    model[2].weight_selected.values = nn.Parameter(model[2].weight_selected.values.detach().clone())
    return "the selected values of 2.weight were replaced since attach"


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "at a later step"])
@pytest.mark.parametrize("replace", [replace_weight, replace_module, replace_head, replace_values])
def test_a_replaced_parameter_is_refused_at_the_next_step(make, steps, replace, tmp_path):
    model, x = network(), torch.randn(4, 6)
    tuner = attached(model)
    optimizer = make(tuner.parameters(), lr=0.1)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
    message = replace(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).square().sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    with pytest.raises(ValueError, match=message):
        fps.save_delta(tuner, tmp_path / "delta.safetensors")
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("module", [True, False])
def test_parameters_of_masked_parameters_are_refused_once_replaced(steps, module):
    model, x = network(), torch.randn(4, 6)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, {"4.weight": torch.rand(3, 8) < 0.5}), lr=0.1)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
    model(x).square().sum().backward()
    if module:
        model[4] = nn.Linear(8, 5)
    else:
        model[4].weight = nn.Parameter(torch.randn(3, 8))
    with pytest.raises(ValueError, match="4.weight was replaced since masked_parameters"):
        optimizer.step()


def test_a_module_that_is_wrapped_keeps_its_hold():
    """Its parameters have other names then, and are the model's all the same."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, x = network(), torch.randn(4, 6)
    tuner = attached(model)
    optimizer = fps.MaskedAdamW(tuner, lr=0.1)
    for wrapped in (False, False, True, True):
        if wrapped:
            model[2] = Wrapper(model[2])
        before = tuner.compact["2.weight"].detach().clone()
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(tuner.compact["2.weight"].detach(), before)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_swapped_tensors_are_followed(make):
    """With this switch torch loads and converts by swapping what two tensors are: the weight's class with it."""
    model, x = network(), torch.randn(4, 6)
    tuner = attached(model)
    optimizer = make(tuner.parameters(), lr=0.1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16).to(torch.float32)
        state = {name: value * 2 for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        assert torch.equal(model(x), torch.func.functional_call(network(), state, (x,)))
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for name, values in tuner.compact.items():
        weight = model.get_parameter(name).detach()
        chosen = tuner.selection[name].mask()
        assert torch.equal(weight[chosen], values.detach())
        assert (weight[chosen] != state[name][chosen]).any()
        assert torch.equal(weight[~chosen], state[name][~chosen])
    tuner.detach()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_data_parallel_is_refused():
    model = network()
    with pytest.raises(ValueError, match="DataParallel model cannot be attached"):
        fps.attach(nn.DataParallel(model), {"module.0.weight": torch.ones(8, 6, dtype=torch.bool)})
    attached(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="cannot be replicated by DataParallel"):
        replica(torch.randn(4, 6))


def test_inference_mode_is_refused_at_once():
    model, mask = network(), {"0.weight": torch.ones(8, 6, dtype=torch.bool)}
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot run under torch.inference_mode"):
        fps.attach(model, mask)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    with torch.inference_mode():
        made_there = network()
    with pytest.raises(ValueError, match="0.weight was made under torch.inference_mode"):
        fps.attach(made_there, mask)


def test_inference_mode_between_steps():
    """Validation runs there, on the model and on copies of it."""
    model, x = network(), torch.randn(4, 6)
    optimizer = fps.MaskedAdamW(attached(model), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            best = copy.deepcopy(model)
            assert torch.equal(best(x), model(x))
    best(x).square().sum().backward()
    assert fps.tuner_of(best).compact["0.weight"].grad is not None
