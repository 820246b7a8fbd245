"""``attach``: gradients, values, bits, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fps_kernels as fps
from fps_kernels.selection import Selection, WeightSelection
from tests.support.models import Classifier, images, labelled
from tests.support.tolerances import assert_sums_close
from tests.support.training import RATES, MaskedByHand, assert_only_selected_moved, copy_of, loss_of, selected, train


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


def test_weights_on_unusual_ways():
    model = Unusual()
    x, tokens = torch.randn(5, 4), torch.tensor([0, 2, 5, 0, 1])
    dense = dense_gradients(model, lambda m: m(x, tokens).sum())
    tuner = fps.attach(model, random_selection(model, ["a", "b"], density=0.5))
    model(x, tokens).sum().backward()
    assert_gradients_match(tuner, dense)


@pytest.mark.parametrize("use", [lambda w, x: x @ w.t(), lambda w, x: F.linear(x, w * 2), lambda w, x: w.norm() + x.sum()])
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


def test_what_is_kept_for_backward_is_the_chosen_columns():
    """One column of a wide input: the layer keeps that column, not the input."""
    model = nn.Sequential(nn.Flatten(1, 2), nn.Linear(512, 8, bias=False))
    mask = torch.zeros(8, 512, dtype=torch.bool)
    mask[:, 7] = True
    x = torch.randn(4, 16, 16, 512, requires_grad=True)
    tuner = fps.attach(model, {"1.weight": mask})

    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = model(x * 1.0)
    weight = model[1].weight.untyped_storage().data_ptr()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for pointer, size in kept.items() if pointer != weight) <= 4 * 256 * 4 + 64
    y.sum().backward()
    assert tuner.compact["1.weight"].grad.shape == (8,)


def test_an_input_of_which_nearly_all_is_needed_is_kept_as_it_is():
    """To copy 15 of 16 columns would cost more memory and time than to refer to all of them."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[torch.arange(15) % 8, torch.arange(15)] = True
    x = torch.randn(4, 16)
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, {"0.weight": mask})
    y = model(x)
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [x.data_ptr()]
    y.square().sum().backward()
    assert_gradients_match(tuner, dense)


@pytest.mark.parametrize("norm", [True, False])
def test_columns_after_norm_and_gelu_are_recomputed(norm):
    """What autograd keeps anyway is not kept twice: behind a GELU or a LayerNorm no column of the input is saved."""
    before = nn.LayerNorm(64) if norm else nn.GELU(approximate="tanh")
    model = nn.Sequential(nn.Linear(64, 64), before, nn.Linear(64, 8))
    x = torch.randn(50, 64)
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, random_selection(model, ["2.weight"], density=0.02, dense=("0.bias", "2.bias")))
    y = model(x)
    held = [t for t in y.grad_fn.saved_tensors if t.dim() == 2 and t.shape[0] == 50]
    source = y.grad_fn.next_functions[0][0].next_functions[1][0]
    memory = source._saved_input if norm else source._saved_self
    assert any(t.data_ptr() == memory.data_ptr() for t in held)
    assert all(t.data_ptr() == memory.data_ptr() or t.shape[1] == 1 for t in held)
    y.square().sum().backward()
    assert_gradients_match(tuner, dense)


def test_the_output_of_relu_is_referred_to_and_not_copied():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(50, 64)
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, random_selection(model, ["2.weight"], density=0.02, dense=("0.bias",)))
    y = model(x)
    relu = y.grad_fn.next_functions[0][0].next_functions[1][0]
    assert any(t.data_ptr() == relu._saved_result.data_ptr() for t in y.grad_fn.saved_tensors)
    y.square().sum().backward()
    assert_gradients_match(tuner, dense)


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_the_gradient_of_an_output_passes_through_uncopied(shape):
    """``F.linear`` of three dimensions returns a view of a matrix; changing a view would copy its gradient three times."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Hardswish(inplace=True))
    x = torch.randn(shape, requires_grad=True)
    tuner = fps.attach(model, random_selection(model, ["0.weight"], density=0.1, dense=("0.bias",)))
    seen = []
    y = model[0](x)
    y.register_hook(lambda gy: seen.append(gy.data_ptr()))
    product = y.grad_fn.next_functions[0][0]
    product.register_prehook(lambda gradients: seen.append(gradients[0].data_ptr()))
    y.square().sum().backward()
    assert "CopySlices" not in y.grad_fn.name()
    assert len(seen) == 2
    assert seen[0] == seen[1]
    tuner.compact["0.weight"].grad = None
    model(x).sum().backward()  # and it can be changed in place
    assert tuner.compact["0.weight"].grad is not None


# ------------------------------------------------------------------------------------------------ bad input


def refused(model: nn.Module, selection, error: type[Exception], match: str) -> None:
    """Refused, with the model unchanged."""
    before = {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        fps.attach(model, selection)
    assert {name: (id(p), type(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [name for name, _ in model.named_modules()] == modules


def test_refuses_to_attach():
    model = Classifier()
    selection = selected(model)
    refused(
        Classifier(classes=6), selected(Classifier(), 0.2) | Selection({"x": selection["hidden.weight"]}), ValueError, "'x'"
    )
    refused(model, Selection({}), ValueError, "selection is empty")
    wrong = WeightSelection.from_mask(torch.ones(20, 13, dtype=torch.bool))
    refused(model, Selection({"hidden.weight": wrong}), ValueError, r"hidden.weight has shape \[20, 12\] here")
    refused(
        model,
        {"position": torch.ones(1, 4, 12, dtype=torch.bool)},
        ValueError,
        "and 2-D convolutions are attached",
    )
    refused(model, {"norm.weight": torch.ones(12, dtype=torch.bool)}, ValueError, "and 2-D convolutions are attached")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        fps.attach("model", selection)

    model.hidden.weight_selected = 1
    refused(model, selection, ValueError, "hidden.weight cannot be attached: hidden has a weight_selected of its own")
    del model.hidden.weight_selected

    parametrizations.spectral_norm(model.hidden)
    name = "hidden.parametrizations.weight.original"
    refused(model, {name: torch.ones(20, 12, dtype=torch.bool)}, TypeError, "belongs to a parametrization")


def test_refuses_weights_without_plain_values():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    refused(model, {"weight": torch.ones(4, 4, dtype=torch.bool)}, ValueError, "weight is on the meta device")
    model = nn.Linear(4, 4).double()
    refused(
        model,
        {"weight": torch.ones(4, 4, dtype=torch.bool)},
        TypeError,
        "weight cannot be tuned: its dtype is torch.float64",
    )

    class Quantised(nn.Parameter):
        pass

    model = nn.Linear(4, 4)
    model.weight = Quantised(model.weight.detach())
    refused(model, {"weight": torch.ones(4, 4, dtype=torch.bool)}, TypeError, "it is a Quantised")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    both = {"0.weight": torch.ones(4, 4, dtype=torch.bool), "1.weight": torch.ones(4, 4, dtype=torch.bool)}
    refused(tied, both, ValueError, "0.weight and 1.weight are one parameter")
    scripted = torch.jit.script(nn.Linear(4, 4))
    refused(scripted, {"weight": torch.ones(4, 4, dtype=torch.bool)}, TypeError, "scripted module")


def test_refuses_to_attach_twice():
    model = Classifier()
    selection = selected(model)
    tuner = fps.attach(model, selection)
    refused(model, selection, ValueError, "attached already")
    refused(model, selection.exclude("embed.*", "out.*"), ValueError, "hidden.weight is attached already")
    tuner.detach()
    fps.attach(model, selection)


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_an_optimizer_of_before_is_refused(make):
    model = Classifier()
    optimizer = make(model.parameters(), lr=0.1)
    tuner = fps.attach(model, selected(model))
    loss_of(model, labelled()).backward()
    before = copy_of(model)
    with pytest.raises(ValueError, match="made before attach.*embed.weight"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    everything = torch.optim.SGD(model.parameters(), lr=0.1)  # the frozen weights too: they have no gradients
    everything.step()
    assert not torch.equal(tuner.compact["embed.weight"], before["embed.weight_selected.values"])


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_no_step_after_detach(make):
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    optimizer = make(tuner.parameters(), lr=0.1)
    loss_of(model, labelled()).backward()
    tuner.detach()
    before = copy_of(model)
    with pytest.raises(ValueError, match="the tuner of embed.weight is detached"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_values_on_another_device_are_refused():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    model.hidden.weight_selected.to("meta")
    with pytest.raises(ValueError, match="hidden.weight is on cpu, its selected values are on meta"):
        model(images())
    with pytest.raises(ValueError, match="hidden.weight is on cpu, its selected values are on meta"):
        tuner.write_back()


def test_attached_weights_are_not_pickled():
    model = nn.Linear(4, 4)
    fps.attach(model, {"weight": torch.eye(4, dtype=torch.bool)})
    with pytest.raises(TypeError, match="weight is attached and cannot be pickled"):
        copy.copy(model.weight)


def test_state_of_another_tuner_is_refused():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    state = tuner.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match="hidden.weight is in one of the two only"):
        tuner.load_state_dict({name: value for name, value in state.items() if name != "hidden.weight"})
    with pytest.raises(ValueError, match=r"hidden.weight has \[1\] values"):
        tuner.load_state_dict({**{n: v + 1 for n, v in state.items()}, "hidden.weight": torch.ones(1)})
    assert all(torch.equal(value, before[name]) for name, value in tuner.state_dict().items())


def test_selecting_again_while_attached():
    model, x = Classifier(), images()
    tuner = fps.attach(model, fps.select(model, [x], budget=fps.PerNeuron(2)))
    again = fps.select(model, [x], budget=fps.PerNeuron(2))
    assert again.keys() == tuner.compact.keys()
    for name in tuner.compact:
        assert torch.equal(again[name].columns, tuner.selection[name].columns)
