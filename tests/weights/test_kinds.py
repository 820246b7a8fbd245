"""Each kind of weight: how calls are read, and that sums and gradients are those of the dense weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.selection import WeightSelection
from fps_kernels.weights.kinds import DIMENSIONS, KINDS, READERS, SCORED_FUNCTIONS, read_calls
from fps_kernels.weights.kinds.embedding import Embedding
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.parts import Part, rows_of
from tests.support.tolerances import assert_sums_close


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# Name -> function, input, weight, and how the function is called.
CALLS = {
    "linear": (F.linear, (2, 5, 6), (4, 6), lambda f, x, w: f(x, w)),
    "linear of one row": (F.linear, (6,), (4, 6), lambda f, x, w: f(x, w, torch.ones(4))),
    "addmm": (torch.addmm, (5, 6), (6, 4), lambda f, x, w: f(torch.ones(4), x, w)),
    "convolution": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 2), lambda f, x, w: f(x, w, None, 2, 1)),
    "grouped convolution": (F.conv2d, (2, 6, 5, 5), (4, 3, 3, 3), lambda f, x, w: f(x, w, groups=2, padding="valid")),
    "convolution of one image": (F.conv2d, (3, 7, 6), (4, 3, 3, 2), lambda f, x, w: f(x, w, dilation=(2, 1))),
    "convolution of signals": (F.conv1d, (2, 3, 11), (4, 3, 3), lambda f, x, w: f(x, w, torch.ones(4), 2, 1, 2)),
    "convolution of one signal": (F.conv1d, (3, 11), (4, 3, 4), lambda f, x, w: f(x, w, padding="same")),
    "grouped convolution of signals": (F.conv1d, (2, 6, 11), (4, 3, 3), lambda f, x, w: f(x, w, groups=2)),
    "convolution of volumes": (
        F.conv3d,
        (2, 3, 5, 6, 7),
        (4, 3, 3, 2, 3),
        lambda f, x, w: f(x, w, None, (2, 1, 2), (1, 0, 1)),
    ),
    "convolution of one volume": (F.conv3d, (3, 6, 6, 7), (4, 3, 2, 2, 3), lambda f, x, w: f(x, w, dilation=(3, 2, 1))),
    "patches of volumes": (F.conv3d, (2, 3, 4, 6, 6), (4, 3, 2, 3, 3), lambda f, x, w: f(x, w, torch.ones(4), (2, 3, 3))),
    "grouped convolution of volumes": (
        F.conv3d,
        (2, 6, 4, 6, 6),
        (4, 3, 2, 3, 3),
        lambda f, x, w: f(x, w, padding="same", groups=2),
    ),
    "transposed convolution": (F.conv_transpose2d, (2, 3, 5, 4), (3, 6, 3, 2), lambda f, x, w: f(x, w, None, 2, 1, 1)),
    "transposed convolution of one image": (
        F.conv_transpose2d,
        (3, 5, 4),
        (3, 6, 2, 2),
        lambda f, x, w: f(x, w, dilation=2),
    ),
    "transposed convolution of signals": (
        F.conv_transpose1d,
        (2, 3, 7),
        (3, 6, 4),
        lambda f, x, w: f(x, w, torch.ones(6), 3, 2, 1),
    ),
    "x @ W": (Tensor.matmul, (2, 5, 6), (6, 4), lambda f, x, w: f(x, w)),
    "a vector @ W": (torch.matmul, (6,), (6, 4), lambda f, x, w: f(x, w)),
    "W @ x": (torch.matmul, (6, 5), (4, 6), lambda f, x, w: f(w, x)),
    "W @ a batch": (torch.matmul, (2, 6, 5), (4, 6), lambda f, x, w: f(w, x)),
    "W @ a vector": (Tensor.matmul, (6,), (4, 6), lambda f, x, w: f(w, x)),
    "x.__rmatmul__": (Tensor.__rmatmul__, (5, 6), (6, 4), lambda f, x, w: f(w, x)),
    "mm": (torch.mm, (5, 6), (6, 4), lambda f, x, w: f(x, w)),
    "bmm": (torch.bmm, (3, 5, 6), (3, 6, 4), lambda f, x, w: f(x, w)),
    "bmm of W": (torch.bmm, (3, 6, 5), (3, 4, 6), lambda f, x, w: f(w, x)),
    "baddbmm": (torch.baddbmm, (3, 5, 6), (3, 6, 4), lambda f, x, w: f(torch.ones(3, 5, 4), x, w)),
    "a stack of products": (torch.matmul, (2, 3, 5, 6), (3, 6, 4), lambda f, x, w: f(x, w)),
    "heads": (torch.einsum, (2, 5, 6), (6, 3, 4), lambda f, x, w: f("bsc,chd->bhsd", x, w)),
    "out of heads": (torch.einsum, (2, 3, 5, 4), (3, 4, 6), lambda f, x, w: f("bhsd, hdo -> bso", x, w)),
    "the weight first": (torch.einsum, (2, 5, 6), (4, 6), lambda f, x, w: f("oc,...c->...o", w, x)),
    "experts by einsum": (torch.einsum, (3, 5, 6), (3, 4, 6), lambda f, x, w: f("etc,eoc->teo", x, w)),
    "grouped": (
        torch._grouped_mm,
        (12, 8),
        (3, 8, 16),
        lambda f, x, w: f(x, w, offs=torch.tensor([5, 5, 12], dtype=torch.int32)),
    ),
}


def read(function, call, x: Tensor, w: Tensor):
    """The call as the kind reads it."""
    seen = []
    call(lambda *args, **kwargs: seen.extend(read_calls(function, args, kwargs)), x, w)
    return next(found for found in seen if found.weight is w)


def call_with(function, call, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """The call with another bias."""

    def replaced(*args, **kwargs):
        ones = [isinstance(a, Tensor) and a is not x and a is not w for a in args]
        return function(*(bias if one else a for a, one in zip(args, ones, strict=True)), **kwargs)

    return call(replaced, x, w)


def layout_of(found, w: Tensor) -> MatrixLayout:
    rows = rows_of(Part.whole(w), found.row_dims, w)
    assert rows is not None
    assert rows.range is None
    return rows.layout


@pytest.mark.parametrize("name", list(CALLS))
def test_gradients_are_those_of_the_dense_weight(name):
    function, input_shape, shape, call = CALLS[name]
    x, w = torch.randn(input_shape), parameter(*shape)
    found = read(function, call, x, w)
    assert found.weight is w
    assert found.input is x
    y = call(function, x, w)
    gy = torch.randn_like(y)
    y.backward(gy)
    layout = layout_of(found, w)
    entries = WeightSelection.from_mask(torch.rand(shape) < 0.4, layout.row_dims)
    dense = layout.matrix(w.grad)[entries.rows(), entries.columns.long()]
    assert_sums_close(found.kind.sampled_gradient(gy, x, entries.row_offsets, entries.columns), dense)


@pytest.mark.parametrize("name", list(CALLS))
def test_products_and_gradients_of_the_input_and_the_bias(name):
    function, input_shape, shape, call = CALLS[name]
    x, w = torch.randn(input_shape, requires_grad=True), parameter(*shape)
    found = read(function, call, x, w)
    y = call(function, x, w)
    with_ones = any(isinstance(other, Tensor) for other in found.others)
    assert_sums_close(found.kind.multiply(x, w), y - 1 if with_ones else y)
    gy = torch.randn_like(y)
    (gx,) = torch.autograd.grad(y, x, gy)
    assert_sums_close(found.kind.input_gradient(gy, w.detach(), x.shape), gx)
    if with_ones:
        bias = found.others[0].requires_grad_()
        assert_sums_close(
            found.kind.bias_gradient(gy, bias.shape), torch.autograd.grad(call_with(function, call, x, w, bias), bias, gy)[0]
        )


@pytest.mark.parametrize("name", list(CALLS))
def test_only_channels_that_are_needed(name):
    """Entries of a few channels need these of the input, and no others."""
    function, input_shape, shape, call = CALLS[name]
    x, w = torch.randn(input_shape), parameter(*shape)
    found = read(function, call, x, w)
    dim = found.kind.channel_dim(x)
    if dim is None:
        return
    y = call(function, x, w)
    gy = torch.randn_like(y)
    y.backward(gy)
    layout = layout_of(found, w)
    size, channels = layout.columns_per_channel, torch.tensor([0, 2])
    kept = (channels.unsqueeze(1) * size + torch.arange(size)).flatten()
    dense = layout.matrix(w.grad)[:, kept]
    every = WeightSelection.whole(MatrixLayout((layout.shape[0], kept.numel())))
    part = found.kind.sampled_gradient(gy, x.index_select(dim, channels), every.row_offsets, every.columns)
    assert_sums_close(part, dense.flatten())


@pytest.mark.parametrize("name", list(CALLS))
def test_sums_of_magnitudes_are_the_gradient_of_magnitudes(name):
    """With an input of magnitudes and an output gradient of ones, a row's gradient is its columns' sums."""
    function, input_shape, shape, call = CALLS[name]
    x, w = torch.randn(input_shape), parameter(*shape)
    found = read(function, call, x, w)
    y = call(function, x.abs(), w)
    y.backward(torch.ones_like(y))
    matrix = layout_of(found, w).matrix(w.grad)
    norm = torch.zeros(found.kind.groups, matrix.shape[1], dtype=torch.float64)
    found.kind.add_column_norms_(x, norm, 1.0)
    assert_sums_close(norm.float(), matrix[:: matrix.shape[0] // found.kind.groups])
    rows = found.kind.input_rows(x)
    if name == "grouped":
        assert rows == (5, 0, 7)
    elif "transposed convolution" in name:
        assert rows == x.numel() // shape[0]
    else:
        assert rows == y.numel() // matrix.shape[0]


def test_an_embedding_is_trained_and_not_scored():
    tokens, w = torch.tensor([[1, 3, 1], [0, 2, 3]]), parameter(5, 4)
    found = READERS[F.embedding](tokens, w, padding_idx=-3)
    y = F.embedding(tokens, w, padding_idx=-3)
    gy = torch.randn_like(y)
    y.backward(gy)
    entries = WeightSelection.from_mask(torch.rand(5, 4) < 0.5)
    dense = w.grad[entries.rows(), entries.columns.long()]
    assert_sums_close(found.kind.sampled_gradient(gy, tokens, entries.row_offsets, entries.columns), dense)
    assert F.embedding not in SCORED_FUNCTIONS


@pytest.mark.parametrize("padding", [-1, 0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embeddings_gradient_in_tensors_of_known_sizes_is_the_same(dtype, padding):
    """As it is computed on a GPU; of whole numbers, whose sums are exact in any order."""
    tokens = torch.randint(50, (6, 9)).int()
    tokens[0, 0] = max(padding, 0)
    gy = torch.randint(-4, 5, (6, 9, 12)).to(dtype)
    mask = torch.rand(50, 12) < 0.3
    mask[11:14] = False
    entries = WeightSelection.from_mask(mask)
    kind = Embedding(padding)
    expected = kind.sampled_gradient(gy, tokens, entries.row_offsets, entries.columns)
    found = kind._without_waiting(gy, tokens, entries.row_offsets, entries.columns)
    assert torch.equal(found, expected)
    assert expected.count_nonzero() > 20
    none = kind._without_waiting(gy[:0], tokens[:0], entries.row_offsets, entries.columns)
    assert torch.equal(none, torch.zeros(entries.nnz))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (F.linear, {"input": torch.ones(3), "weight": torch.ones(3)}),
        (torch.addmm, {"input": torch.ones(2), "mat1": torch.ones(1, 3), "mat2": torch.ones(3, 2), "alpha": 2}),
        (F.embedding, {"input": torch.tensor([0]), "weight": torch.ones(3, 2), "max_norm": 1.0}),
        (F.embedding, {"input": torch.tensor([0]), "weight": torch.ones(3, 2), "scale_grad_by_freq": True}),
    ],
)
def test_what_a_kind_does_not_serve_it_does_not_read(function, arguments):
    assert READERS[function](**arguments) is None


def test_the_registry_has_every_function_once():
    functions = [function for kind in KINDS for function in kind.FUNCTIONS]
    assert len(functions) == len(set(functions)) == len(READERS)
    assert {2, 3, 4, 5} == DIMENSIONS


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (torch.mm, (torch.ones(2, 3), torch.ones(3, 2)), {"out_dtype": torch.float32}),
        (torch.addmm, (1, torch.ones(2), 2, torch.ones(2, 3), torch.ones(3, 2)), {}),
        (F.linear, (torch.ones(3),), {}),
        (torch.matmul, (torch.ones(3),), {"nothing": 1}),
    ],
)
def test_forms_that_a_reader_does_not_know_are_read_as_none(function, arguments, options):
    """They are torch's to run, or to refuse."""
    assert read_calls(function, arguments, options) == ()


def test_errors_inside_of_a_reader_are_not_hidden():
    with pytest.raises(TypeError):
        read_calls(F.conv2d, (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3)), {"stride": object()})
