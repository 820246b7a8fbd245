"""Each kind of weight: how calls are read, and that sums and gradients are those of the dense weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.selection import WeightSelection
from fps_kernels.weights.kinds import DIMENSIONS, KINDS, READERS, SCORING_READERS
from fps_kernels.weights.kinds.embedding import Embedding
from fps_kernels.weights.matrix import MatrixLayout
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
}


def read(function, call, x: Tensor, w: Tensor):
    """The call as the kind reads it."""
    seen = []
    call(lambda *args, **kwargs: seen.append(READERS[function](*args, **kwargs)), x, w)
    return seen[0]


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
    layout = MatrixLayout(shape, found.transposed)
    entries = WeightSelection.from_mask(torch.rand(shape) < 0.4, found.transposed)
    dense = layout.matrix(w.grad)[entries.rows(), entries.columns.long()]
    assert_sums_close(found.kind.sampled_gradient(gy, x, entries.row_offsets, entries.columns), dense)


@pytest.mark.parametrize("name", list(CALLS))
def test_sums_of_magnitudes_are_the_gradient_of_magnitudes(name):
    """With an input of magnitudes and an output gradient of ones, a row's gradient is its columns' sums."""
    function, input_shape, shape, call = CALLS[name]
    x, w = torch.randn(input_shape), parameter(*shape)
    found = read(function, call, x, w)
    y = call(function, x.abs(), w)
    y.backward(torch.ones_like(y))
    matrix = MatrixLayout(shape, found.transposed).matrix(w.grad)
    norm = torch.zeros(found.kind.groups, matrix.shape[1], dtype=torch.float64)
    found.kind.add_column_norms_(x, norm, 1.0)
    assert_sums_close(norm.float(), matrix[:: matrix.shape[0] // found.kind.groups])
    assert found.kind.input_rows(x) == y.numel() // matrix.shape[0]


def test_an_embedding_is_trained_and_not_scored():
    tokens, w = torch.tensor([[1, 3, 1], [0, 2, 3]]), parameter(5, 4)
    found = READERS[F.embedding](tokens, w, padding_idx=-3)
    y = F.embedding(tokens, w, padding_idx=-3)
    gy = torch.randn_like(y)
    y.backward(gy)
    entries = WeightSelection.from_mask(torch.rand(5, 4) < 0.5)
    dense = w.grad[entries.rows(), entries.columns.long()]
    assert_sums_close(found.kind.sampled_gradient(gy, tokens, entries.row_offsets, entries.columns), dense)
    assert F.embedding not in SCORING_READERS


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
    assert {2, 4} == DIMENSIONS
