"""Tensors in fewer bits, one by one."""

import pytest
import torch

import fps_kernels as fps
from fps_kernels.keeping.packed import Mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (3, 5, 7), (64, 33)])
def test_a_mask_comes_back_as_it_was(shape, dtype):
    mask = torch.rand(shape) < 0.5
    mask.view(-1)[0] = True
    mask = mask if dtype is torch.bool else mask.to(dtype) * 1.25
    assert torch.equal(Mask(mask, None, None).tensor(), mask)


def test_images_wait_for_nothing_when_the_context_is_left():
    images = torch.randn(4, 16, 12, 13, requires_grad=True)
    with fps.kept():
        x = images * 1
        for _ in range(6):
            x = x.sigmoid()
        still = x
    node = still.grad_fn
    assert node._raw_saved_result.data.packed._waiting is None
    (found,) = torch.autograd.grad(still.sum(), images)
    (exact,) = torch.autograd.grad((lambda x: [x := x.sigmoid() for _ in range(6)][-1])(images).sum(), images)
    assert float((found - exact).norm()) < 0.03 * float(exact.norm())
