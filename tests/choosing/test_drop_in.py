"""The drop-in functions agree with the torch lines that they replace."""

import pytest
import torch

import fps_kernels as fps


@pytest.mark.parametrize("ord", [1, 2, float("inf")])
def test_column_norm_is_vector_norm(ord):
    x = torch.randn(3, 41, 17)
    expected = torch.linalg.vector_norm(x.double(), ord, dim=(0, 1))
    torch.testing.assert_close(fps.column_norm(x, ord), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_score_topk_is_topk(dtype):
    W, a = torch.randn(9, 33, requires_grad=True), torch.rand(33).to(dtype)
    expected = (W.abs() * a.float()).topk(4).indices.sort(1).values
    assert torch.equal(fps.score_topk(W, a, 4).long(), expected)


def test_bad_input():
    with pytest.raises(ValueError, match="at least one dimension"):
        fps.column_norm(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x must be float32"):
        fps.column_norm(torch.ones(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="a must be floating-point, got torch.int64"):
        fps.score_topk(torch.ones(2, 3), torch.ones(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="k must be between 1 and the 3 columns of W, got 4"):
        fps.score_topk(torch.ones(2, 3), torch.ones(3), 4)
