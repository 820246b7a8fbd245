"""What a layer keeps of its input for the gradient of its chosen entries: columns, a reference, or nothing."""

import pytest
import torch
from torch import nn

import fps_kernels as fps
from tests.support.gradients import assert_gradients_match, dense_gradients, random_selection


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
