"""Every way a weight can be multiplied with is seen, and nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fps_kernels.weights.watching import WeightInterception, WeightUse


def watch(parameters: dict, run) -> tuple[list[WeightUse], dict[str, str]]:
    """What is seen, the same way by watched weights and, since somebody has a view of them, by a look at every function."""
    uses: list[WeightUse] = []
    interception = WeightInterception(parameters, uses.append)
    with torch.no_grad(), interception:
        run()
    views, seen = [p.detach() for p in parameters.values()], []
    every = WeightInterception(parameters, seen.append)
    with torch.no_grad(), every:
        run()
    del views
    described = [[(u.name, u.layout, u.rows, u.input.shape, u.kind) for u in found] for found in (uses, seen)]
    assert described[0] == described[1]
    assert interception.other_uses == every.other_uses
    return uses, interception.other_uses


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def test_linear_positional_and_by_keyword():
    w, x = parameter(4, 3), torch.randn(2, 3)
    uses, _ = watch({"w": w}, lambda: (F.linear(x, w), F.linear(input=x, weight=w, bias=None)))
    assert [(use.name, use.rows, use.input is x) for use in uses] == [("w", (0, 4), True)] * 2


def test_rows_of_a_weight():
    w, x = parameter(6, 3), torch.randn(2, 3)
    uses, _ = watch({"w": w}, lambda: (F.linear(x, w[2:4]), *(F.linear(x, part) for part in w.chunk(3))))
    assert [use.rows for use in uses] == [(2, 4), (0, 2), (2, 4), (4, 6)]
    assert {use.layout.shape for use in uses} == {(6, 3)}


def test_columns_of_a_weight_and_copies_are_not_the_weight():
    w, x = parameter(6, 4), torch.randn(2, 2)
    uses, others = watch({"w": w}, lambda: (F.linear(x, w[:, :2]), F.linear(x, w.float()[:, 2:] * 2)))
    assert uses == []
    assert others == {"w": "__getitem__()"}


def test_addmm_is_transposed():
    w, x, b = parameter(3, 5), torch.randn(2, 3), torch.randn(5)
    (use,), _ = watch({"w": w}, lambda: torch.addmm(b, x, w))
    assert use.layout.row_dims == (1,)
    assert use.layout.shape == (5, 3)
    assert use.rows == (0, 5)


def test_some_inputs_of_a_transposed_weight_are_not_its_rows():
    w, x, b = parameter(6, 5), torch.randn(2, 4), torch.randn(5)
    uses, others = watch({"w": w}, lambda: torch.addmm(b, x, w[:4]))
    assert uses == []
    assert others == {"w": "__getitem__()"}


def test_matrices_that_are_stacked_in_one():
    """Experts as Dbrx keeps them: each is a block of inputs of the transposed weight."""
    w, x = parameter(6, 5), torch.randn(2, 3)
    uses, _ = watch({"w": w}, lambda: (x @ w.view(2, 3, 5)[0], x @ w[3:]))
    assert [use.rows for use in uses] == [(0, 5), (5, 10)]
    assert all(use.layout.shape == (10, 3) for use in uses)
    assert torch.equal(uses[0].layout.matrix(w), w.view(2, 3, 5).transpose(1, 2).reshape(10, 3))


@pytest.mark.parametrize("n", [3, 4])
def test_transposed_views(n):
    """A transposed square weight has the weight's shape; only its strides tell."""
    w, x, b = parameter(4, n), torch.randn(2, n), torch.randn(4)
    (use,), _ = watch({"w": w}, lambda: torch.addmm(b, x, w.t()))
    assert use.layout.row_dims == (0,)
    assert use.rows == (0, 4)
    (use,), _ = watch({"w": w}, lambda: F.linear(torch.randn(2, 4), w.t()))
    assert use.layout.row_dims == (1,)
    assert use.rows == (0, n)


def test_attention_of_every_kind():
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    same = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    uses, _ = watch(dict(same.named_parameters()), lambda: same(query, query, query))
    assert [(u.name, u.rows) for u in uses] == [("in_proj_weight", (0, 24)), ("out_proj.weight", (0, 8))]
    uses, _ = watch(dict(same.named_parameters()), lambda: same(query, key, key))
    assert [(u.name, u.rows) for u in uses[:2]] == [("in_proj_weight", (0, 8)), ("in_proj_weight", (8, 24))]
    uses, _ = watch(dict(same.named_parameters()), lambda: same(query, key, value))
    assert [u.rows for u in uses[:3]] == [(0, 8), (8, 16), (16, 24)]
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True).eval()
    uses, _ = watch(dict(apart.named_parameters()), lambda: apart(query, key[..., :6], value[..., :4]))
    assert [u.name for u in uses] == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_attention_computes_the_same():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = attention(x, x, x, need_weights=True)
        with WeightInterception(dict(attention.named_parameters()), lambda use: None):
            got = attention(x, x, x, need_weights=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_transformer_layer_takes_no_fused_shortcut():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    uses, _ = watch(dict(layer.named_parameters()), lambda: layer(torch.randn(2, 3, 8)))
    assert [u.name for u in uses] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("kwargs", "padding"),
    [
        ({}, (0, 0, 0, 0)),
        ({"padding": 1, "stride": (2, 1)}, (1, 1, 1, 1)),
        ({"padding": "same"}, (1, 1, 0, 1)),
        ({"padding": "valid"}, (0, 0, 0, 0)),
        ({"padding": (2, 0), "dilation": 2}, (2, 2, 0, 0)),
    ],
)
def test_convolution_geometry(kwargs, padding):
    conv = nn.Conv2d(4, 6, (3, 2), groups=2, **kwargs)
    (use,), _ = watch({"w": conv.weight}, lambda: conv(torch.randn(1, 4, 7, 8)))
    assert use.kind.geometry.padding == padding
    assert use.kind.geometry.groups == 2
    assert use.layout.shape == (6, 12)
    (use,), _ = watch({"w": conv.weight}, lambda: conv(torch.randn(4, 7, 8)))  # without a batch dimension
    assert use.kind.input_rows(use.input) == conv(torch.randn(1, 4, 7, 8))[0, 0].numel()


def test_other_functions_are_named():
    w, x = parameter(3, 3), torch.randn(2, 3)
    stack = [parameter(1, 3), parameter(1, 3)]
    uses, others = watch({"w": w, "a": stack[0]}, lambda: (x * w.sum(), torch.cat(stack)))
    assert uses == []
    assert others == {"w": "sum()", "a": "cat()"}


def test_views_by_property_and_inputs_are_named():
    """``w.T`` is a property, and a learned query is what another weight multiplies: both are uses."""
    w, v, query, x = parameter(3, 3), parameter(3, 3), parameter(2, 3), torch.randn(2, 3)
    known = {"w": w, "v": v, "query": query}
    uses, others = watch(known, lambda: (x @ w.T, x @ v.data, F.linear(query, w), w.shape, w.dtype, w.grad))
    assert [use.name for use in uses] == ["w", "v", "w"]
    assert others == {"w": "Tensor.T", "v": "Tensor.data", "query": "the input of linear()"}


def test_an_exception_ends_the_interception():
    w, x = parameter(3, 3), torch.randn(2, 3)
    uses: list[WeightUse] = []
    with pytest.raises(ZeroDivisionError), WeightInterception({"w": w}, uses.append):
        F.linear(x, w)
        raise ZeroDivisionError
    F.linear(x, w)
    assert len(uses) == 1
