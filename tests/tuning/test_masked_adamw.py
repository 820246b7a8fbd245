"""``MaskedAdamW``: unselected entries keep their bits, selected ones follow torch.optim.AdamW."""

import copy
import io

import pytest
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.selection import Selection
from tests.support.models import Classifier, images, labelled
from tests.support.training import (
    RATES,
    MaskedByHand,
    assert_only_selected_moved,
    copy_of,
    loss_of,
    selected,
    selected_like,
    train,
)


@pytest.mark.parametrize("maximize", [False, True])
def test_follows_torch_adamw_and_leaves_the_rest_alone(maximize):
    model = Classifier()
    twin, before, selection = copy.deepcopy(model), copy_of(model), selected(model)
    batches = [labelled() for _ in range(5)]
    rates = RATES | {"maximize": maximize, "betas": (0.8, 0.95), "eps": 1e-6}
    train(model, fps.MaskedAdamW(fps.masked_parameters(model, selection), **rates), batches)
    train(twin, MaskedByHand(twin, selection, **rates), batches)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert_only_selected_moved(model, before, selection)


def test_state_is_compact():
    model = Classifier()
    selection = selected(model, 0.05)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    train(model, optimizer, [labelled()])
    for name, entries in selection.items():
        state = optimizer.state[model.get_parameter(name)]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == entries.nnz


def test_plain_masks():
    model = Classifier()
    before = copy_of(model)
    masks = {"hidden.weight": model.hidden.weight.abs() > 0.2, "norm.bias": torch.arange(12) < 4}
    train(model, fps.MaskedAdamW(fps.masked_parameters(model, masks), **RATES), [labelled() for _ in range(3)])
    assert_only_selected_moved(model, before, Selection.from_masks(masks))


def test_plain_parameters_are_tuned_whole():
    model = Classifier()
    twin = copy.deepcopy(model)
    batches = [labelled() for _ in range(4)]
    train(model, fps.MaskedAdamW(model.parameters(), **RATES), batches)
    train(twin, torch.optim.AdamW(twin.parameters(), **RATES), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_float32_masters(dtype):
    """A thousand steps that are each too small for the weight's own dtype add up in the master."""
    model = nn.Linear(4, 3, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, {"weight": torch.eye(3, 4).bool()}), lr=1e-5, weight_decay=0)
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(state["master"], torch.full((3,), 0.99), rtol=0, atol=1e-4)
    assert torch.equal(model.weight.diagonal(), state["master"].to(dtype))
    assert (model.weight[~torch.eye(3, 4).bool()] == 1).all()


def test_convolutions_in_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 5))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    before = copy_of(twin)
    selection = fps.select(model, [images()], budget=fps.PerTensor(0.1))
    batches = [labelled() for _ in range(3)]
    for m in (model, twin):
        train(m, fps.MaskedAdamW(fps.masked_parameters(m, selection), **RATES), batches)
    assert not twin[0].weight.is_contiguous()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_only_selected_moved(twin, before, selection)


@pytest.mark.parametrize(("weight_last", "grad_last"), [(True, False), (False, True)])
def test_gradients_of_another_memory_format(weight_last, grad_last):
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    weight, grad = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    mask = torch.rand(6, 4, 3, 3) < 0.3
    got = []
    for last, gradient_last in ((False, False), (weight_last, grad_last)):
        p = nn.Parameter(weight.clone().to(memory_format=formats[last]))
        p.grad = grad.to(memory_format=formats[gradient_last])
        module = nn.Module()
        module.register_parameter("w", p)
        fps.MaskedAdamW(fps.masked_parameters(module, {"w": mask}), **RATES).step()
        got.append(p.detach())
    assert torch.equal(*got)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype, capturable):
    model = Classifier().to(dtype)
    selection = fps.select(model, [images().to(dtype)], budget=fps.PerTensor(0.1))
    batches = [labelled() for _ in range(6)]

    def optimizer_of(m):
        rates = RATES | {"lr": torch.tensor(3e-3)} if capturable else RATES
        return fps.MaskedAdamW(fps.masked_parameters(m, selection), capturable=capturable, **rates)

    optimizer = optimizer_of(model)
    train(model, optimizer, batches[:3])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, batches[3:])

    resumed = Classifier().to(dtype)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)  # the state holds tensors and numbers only
    resumed.load_state_dict(saved["model"])
    again = optimizer_of(resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, batches[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(value, again.state[q][key])
            assert value.dtype == again.state[q][key].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_pattern_of_the_others_is_kept(dtype):
    """Negative zeros, subnormals and the payloads of NaN included."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (33, 50), dtype=integer)
    module, mask = nn.Module(), torch.rand(33, 50) < 0.1
    module.w = nn.Parameter(torch.where(mask, torch.ones((), dtype=dtype), bits.view(dtype)))
    bits = module.w.detach().clone().view(integer)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(module, {"w": mask}), **RATES)
    for _ in range(3):
        module.w.grad = torch.randn(33, 50).to(dtype)
        optimizer.step()
    moved = module.w.detach().view(integer) != bits
    assert not moved[~mask].any()
    assert moved[mask].any()


def test_a_model_that_changes_its_dtype():
    model = nn.Linear(4, 4)
    optimizer = fps.MaskedAdamW(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["master"].view(4, 4).bfloat16(), model.weight)


def test_a_view_of_the_same_memory_with_other_strides():
    parameter = nn.Parameter(torch.randn(2, 2, 3, 3))
    mask = torch.rand(2, 2, 3, 3) < 0.3
    module = nn.Module()
    module.w = parameter
    optimizer = fps.MaskedAdamW(fps.masked_parameters(module, {"w": mask}), **RATES)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.data = parameter.data.transpose(2, 3)
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter != before, mask)


def test_sizes_of_zero_and_scalars():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((0, 5), (5, 0), (0,), ())]
    optimizer = fps.MaskedAdamW(parameters, lr=0.1, weight_decay=0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(parameters[3].detach(), torch.tensor(0.9))
    module = nn.Linear(3, 3)
    nothing = fps.MaskedAdamW(fps.masked_parameters(module, {"weight": torch.zeros(3, 3).bool()}))
    module.weight.grad = torch.ones(3, 3)
    nothing.step()
    nothing.load_state_dict(nothing.state_dict())


def test_deep_copies_are_independent():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    train(model, optimizer, [labelled()])
    twin_model, twin = copy.deepcopy((model, optimizer))
    batch = labelled()
    train(model, optimizer, [batch])
    train(twin_model, twin, [batch])
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameters_that_move_in_memory():
    """``.to()`` and ``.data =`` replace the memory of a parameter; the optimizer must follow."""
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    train(model, optimizer, [labelled()])
    for p in model.parameters():
        p.data = p.data.clone()
    before = copy_of(model)
    train(model, optimizer, [labelled()])
    assert_only_selected_moved(model, before, selected_like(optimizer, model))


def test_gradients_that_are_missing_are_skipped():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    before = copy_of(model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.hidden.weight.grad = torch.ones_like(model.hidden.weight)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"hidden.weight"}


def test_saved_activations_notice_the_update():
    """The step bumps the version of the weights, so that a backward through stale values is an error and not a lie."""
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    loss = loss_of(model, labelled())
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
