"""What a layer keeps of its input for the gradient of its chosen entries: columns, a reference, or nothing."""

import copy

import pytest
import torch
from torch import nn

import fps_kernels as fps
from tests.support.gradients import assert_gradients_match, dense_gradients, random_selection
from tests.support.tolerances import assert_sums_close


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


def in_between(middle: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(64, 64), middle, nn.Linear(64, 8)), torch.randn(50, 64)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "middle",
    [
        nn.LayerNorm(64),
        nn.LayerNorm(64, bias=False),
        nn.LayerNorm(64, elementwise_affine=False),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
    ],
    ids=str,
)
def test_columns_after_norm_and_gelu_are_recomputed(middle, backend):
    """What autograd keeps anyway is not kept twice: behind a GELU or a LayerNorm no column of the input is saved."""
    model, x = in_between(middle)
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, random_selection(model, ["2.weight"], density=0.02, dense=("0.bias", "2.bias")))
    y = model(x)
    assert y.grad_fn.saved_tensors == ()
    with fps.use_backend(backend):
        y.square().sum().backward()
    assert_gradients_match(tuner, dense)


def test_layer_norm_of_numbers_far_from_zero_is_recomputed_without_cancellation():
    """As ``x * scale - mean * scale`` it would be off by the rounding of both products."""
    model, x = in_between(nn.LayerNorm(64))
    with torch.no_grad():
        model[0].bias.add_(1e4)
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().sum().backward()
    dense = dense_gradients(model, lambda m: m(x).square().sum())["2.weight"]
    tuner = fps.attach(model, random_selection(model, ["2.weight"], density=0.02, dense=("0.bias",)))
    model(x).square().sum().backward()
    chosen = tuner.selection["2.weight"].mask()
    error = (tuner.compact["2.weight"].grad - exact[2].weight.grad[chosen]).abs().max()
    assert error <= 2 * (dense - exact[2].weight.grad).abs().max()


def test_the_output_of_relu_is_referred_to_and_not_copied():
    model, x = in_between(nn.ReLU())
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    tuner = fps.attach(model, random_selection(model, ["2.weight"], density=0.02, dense=("0.bias",)))
    y = model(x)
    relu = y.grad_fn.next_functions[0][0]
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [relu._saved_result.data_ptr()]
    y.square().sum().backward()
    assert_gradients_match(tuner, dense)


def test_a_small_input_is_kept_as_it_is():
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 64)
    fps.attach(model, random_selection(model, ["0.weight"], density=0.02))
    y = model(x)
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_a_layer_is_one_node(shape):
    """Whose output can be changed in place: ``F.linear`` of three dimensions returns a view, a change to which would copy
    its gradient three times."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Hardswish(inplace=True))
    x = torch.randn(shape, requires_grad=True)
    tuner = fps.attach(model, random_selection(model, ["0.weight"], density=0.1, dense=("0.bias",)))
    y = model[0](x)
    assert {node.name() for node, _ in y.grad_fn.next_functions if node is not None} == {"torch::autograd::AccumulateGrad"}
    y = model(x)
    assert "CopySlices" not in y.grad_fn.name()
    y.sum().backward()
    assert tuner.compact["0.weight"].grad is not None
    assert model[0].bias.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), torch.randn(4, 9, 9)),
        (nn.Conv2d(4, 8, (2, 4), padding="same", dilation=2), torch.randn(2, 4, 9, 9)),
    ],
    ids=["conv", "grouped, one image", "uneven padding"],
)
def test_a_convolution_is_one_node_that_does_not_keep_its_images(layer, x):
    """torch's own keeps them for the gradient of a weight that has none."""
    model = nn.Sequential(nn.Identity(), layer)
    x.requires_grad_()
    dense = dense_gradients(model, lambda m: m(x).square().sum())
    expected, x.grad = x.grad.clone(), None
    tuner = fps.attach(model, random_selection(model, ["1.weight"], density=0.02, dense=("1.bias",)))
    y = model(x)
    assert {node.name() for node, _ in y.grad_fn.next_functions if node is not None} == {"torch::autograd::AccumulateGrad"}
    y.square().sum().backward()
    assert_gradients_match(tuner, dense)
    assert_sums_close(x.grad, expected, 1e-4)
