"""``attach``: gradients, values, bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from tests.support.gradients import assert_gradients_match, dense_gradients, random_selection
from tests.support.models import Classifier, images, labelled
from tests.support.training import RATES, MaskedByHand, assert_only_selected_moved, copy_of, loss_of, selected, train


def test_only_the_chosen_entries_and_the_dense_parameters_are_trainable():
    model = Classifier()
    selection = selected(model)
    keys = list(model.state_dict())
    forward = model(x := images())
    tuner = fps.attach(model, selection)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), forward)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    compact = {f"{name}_selected.values": p for name, p in tuner.compact.items()}
    dense = {name: model.get_parameter(name) for name in selection.dense}
    assert {name: id(p) for name, p in trainable.items()} == {name: id(p) for name, p in {**compact, **dense}.items()}
    assert [id(p) for p in tuner.parameters()] == [id(p) for p in (*tuner.compact.values(), *tuner.dense.values())]
    for name, p in tuner.compact.items():
        assert torch.equal(p, model.get_parameter(name).detach()[selection.masks()[name]])
    assert repr(tuner).startswith(f"Tuner({selection.nnz} entries of {len(selection)} weights")


def test_gradients_and_no_dense_one():
    model, batch = Classifier(), labelled()
    dense = dense_gradients(model, lambda m: loss_of(m, batch))
    tuner = fps.attach(model, selected(model))
    loss_of(model, batch).backward()
    assert_gradients_match(tuner, dense)
    assert all(model.get_parameter(name).grad is None for name in tuner.compact)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups, layout):
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), groups=groups), nn.ReLU(inplace=True))
    x = torch.randn(2, 4, 9, 7)
    if layout == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, random_selection(model, ["0.weight"], dense=("0.bias",)))
    optimizer = fps.MaskedAdamW(tuner, lr=0.1)
    before = copy_of(model)["0.weight"]
    model(x).square().sum().backward()
    assert_gradients_match(tuner, dense)
    optimizer.step()
    mask = tuner.selection.masks()["0.weight"]
    assert torch.equal(model[0].weight.detach()[~mask], before[~mask])
    assert torch.equal(model[0].weight.detach()[mask].sort().values, tuner.compact["0.weight"].detach().sort().values)
    model(x[0])  # one image without a batch dimension


def test_attention_with_three_inputs():
    """Cross-attention multiplies by rows of one weight: each part brings the gradients of its rows."""
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    loss = lambda m: sum(m(a, b, b)[0].square().sum() for a, b in ((q, k), (q, q)))  # noqa: E731
    dense = dense_gradients(model, loss)
    names = ["in_proj_weight", "out_proj.weight"]
    tuner = fps.attach(model, random_selection(model, names, dense=("in_proj_bias",)))
    loss(model).backward()
    assert_gradients_match(tuner, dense)


class Unusual(nn.Module):
    """Weights on their way to a multiplication: transposed, cut, cast, looked up, looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.a[1:4]) + F.linear(x, self.a[3:]).relu()
        z = F.linear(x, self.b.to(torch.float32).contiguous()) + torch.addmm(torch.zeros(6), x, self.b.t())
        assert self.b.shape == (6, 4)
        return torch.cat([y, z, F.embedding(tokens, self.b, padding_idx=2)], dim=1).square()


def test_some_rows_of_a_convolution_and_of_an_embedding():
    """Each use gives gradients to the entries of its rows, also where these are groups of their own."""

    class Rows(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.groups = groups
            self.kernel = nn.Parameter(torch.randn(6, 4 // groups, 3, 3))
            self.table = nn.Parameter(torch.randn(9, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, rest = self.kernel[:4], self.kernel[4:]
            y = F.conv2d(x, first, groups=self.groups).sum() + F.conv2d(x, rest, groups=self.groups).square().sum()
            return y + F.embedding(torch.tensor([0, 3, 3]), self.table[2:7], padding_idx=0).square().sum()

    x = torch.randn(2, 4, 6, 5)
    model = Rows(groups=1)
    dense = dense_gradients(model, lambda m: m(x))
    tuner = fps.attach(model, random_selection(model, ["kernel", "table"]))
    model(x).backward()
    assert_gradients_match(tuner, dense)

    grouped = Rows(groups=2)
    dense = dense_gradients(grouped, lambda m: m(x))
    tuner = fps.attach(grouped, random_selection(grouped, ["kernel"]))
    grouped(x).backward()
    assert_gradients_match(tuner, dense)


def test_weights_on_unusual_ways():
    model = Unusual()
    x, tokens = torch.randn(5, 4), torch.tensor([0, 2, 5, 0, 1])
    dense = dense_gradients(model, lambda m: m(x, tokens).sum())
    tuner = fps.attach(model, random_selection(model, ["a", "b"], density=0.5))
    model(x, tokens).sum().backward()
    assert_gradients_match(tuner, dense)


@pytest.mark.parametrize(
    "use", [lambda w, x: x @ (w + 1).t(), lambda w, x: F.linear(x, w * 2), lambda w, x: w.norm() + x.sum()]
)
def test_a_gradient_that_would_be_lost_is_an_error(use):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return use(self.weight, x)

    model, x = Odd(), torch.randn(3, 4)
    expected = model(x).detach()
    with fps.attach(model, random_selection(model, ["weight"])):
        assert torch.equal(model(x), expected)  # the value is right; only its gradient would not be
        with torch.no_grad():
            assert not model(x).requires_grad
        with pytest.raises(RuntimeError, match="gradient reached weight through .* which attach"):
            model(x).sum().backward()
        with pytest.raises(RuntimeError, match="gradient reached weight"):
            model.weight.clone().sum().backward()
        model.weight.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_steps_with_decay_leave_every_other_bit(dtype):
    model = Classifier().to(dtype)
    selection = fps.select(model, [images().to(dtype)], budget=fps.PerTensor(0.1))
    before = copy_of(model)
    tuner = fps.attach(model, selection)
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    train(model, optimizer, [labelled() for _ in range(100)])
    for name, values in tuner.compact.items():
        held = model.get_parameter(name).detach()[selection.masks()[name]]
        assert values.dtype == torch.float32
        assert torch.equal(held, values.detach().to(dtype))
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


@pytest.mark.parametrize("zero_grads", [False, True])
def test_follows_adamw_on_the_same_entries(zero_grads):
    model = Classifier()
    twin = copy.deepcopy(model)
    selection = selected(model)
    batches = [labelled() for _ in range(10)]
    optimizer = fps.MaskedAdamW(fps.attach(model, selection), **RATES, zero_grads=zero_grads)
    for batch in batches:
        if not zero_grads:
            optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    if zero_grads:
        assert all(p.grad.count_nonzero() == 0 for group in optimizer.param_groups for p in group["params"])
    train(twin, MaskedByHand(twin, selection, **RATES), batches)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach(), rtol=1e-4, atol=1e-5)


def test_zeroing_needs_gradients_that_are_all_read():
    model = Classifier()
    groups = fps.masked_parameters(model, selected(model))
    with pytest.raises(ValueError, match="zero_grads=True leaves the other gradients of embed.weight"):
        fps.MaskedAdamW(groups, zero_grads=True)


def test_values_changed_by_hand_reach_the_next_forward_and_the_state():
    model, x = Classifier(), images()
    tuner = fps.attach(model, selected(model))
    before = model(x)
    values = tuner.compact["hidden.weight"]
    with torch.no_grad():
        values += 1
    assert not torch.equal(model(x), before)
    with torch.no_grad():
        values += 1
    held = model.state_dict()["hidden.weight"][tuner.selection.masks()["hidden.weight"]]
    assert torch.equal(held, values.detach())
    with torch.no_grad():
        values += 1
    tuner.write_back()
    assert torch.equal(model.hidden.weight.detach()[tuner.selection.masks()["hidden.weight"]], values.detach())


def test_loading_a_state_dict_moves_the_values():
    model, other = Classifier(), Classifier()
    tuner = fps.attach(model, selected(model))
    model.load_state_dict(other.state_dict())
    for name, p in tuner.compact.items():
        assert torch.equal(p.detach(), other.get_parameter(name).detach()[tuner.selection.masks()[name]])
    with pytest.raises(RuntimeError, match=r"assign=True\) would replace attached weights"):
        model.load_state_dict(other.state_dict(), assign=True)
    tuner.detach()
    model.load_state_dict(other.state_dict(), assign=True)


def test_detach_leaves_a_plain_model():
    model = Classifier()
    model.position.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with fps.attach(model, selected(model)) as tuner:
        optimizer = fps.MaskedAdamW(tuner, **RATES)
        train(model, optimizer, [labelled()])
        tuned = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(value, tuned[key]) for key, value in model.state_dict().items())
    dense = dense_gradients(model, lambda m: loss_of(m, labelled()))
    assert dense.keys() == {name for name, flag in flags.items() if flag}
    tuner.detach()
    again = fps.attach(model, selected(model))
    again.detach()


def test_deepcopy_is_a_second_model():
    model, batch = Classifier(), labelled()
    tuner = fps.attach(model, selected(model))
    with torch.no_grad():
        tuner.compact["hidden.weight"].mul_(2)  # not written into the weight yet
    twin = copy.deepcopy(tuner)
    assert torch.equal(twin.model(batch[0]), model(batch[0]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(twin.model, fps.MaskedAdamW(twin, **RATES), [batch])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(twin.model.hidden.weight, model.hidden.weight)
    twin.detach()
    loss_of(model, batch).backward()
    assert tuner.compact["hidden.weight"].grad is not None


def test_moving_to_another_dtype_keeps_float32_values():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    exact = tuner.compact["hidden.weight"].detach().clone()
    model.to(torch.bfloat16)
    assert model.hidden.weight.dtype == torch.bfloat16
    assert tuner.compact["hidden.weight"].dtype == torch.float32
    assert torch.equal(tuner.compact["hidden.weight"].detach(), exact)
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    train(model, optimizer, [labelled()])
    mask = tuner.selection.masks()["hidden.weight"]
    assert torch.equal(model.hidden.weight.detach()[mask], tuner.compact["hidden.weight"].detach().bfloat16())
    model.to(torch.float32)
    train(model, optimizer, [labelled()])
    assert model.hidden.weight.dtype == torch.float32


def test_a_trace_says_to_detach():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(2, 6)
    tuner = fps.attach(model, fps.select(model, [x], progress=False))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record an attached model: detach its tuner first"):
        torch.jit.trace(model, x)
    expected = model(x)
    tuner.detach()
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
