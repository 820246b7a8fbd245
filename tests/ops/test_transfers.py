"""What comes from a device is what was there, in one copy; what goes there does not block."""

import pytest
import torch

from fps_kernels.ops.transfers import fetched, sent, uploaded

SHAPES = [(), (0,), (1,), (3, 5), (7,), (2, 0, 3), (2, 3, 4)]
DTYPES = [torch.float64, torch.bool, torch.float16, torch.int32, torch.uint8, torch.bfloat16, torch.int64, torch.float32]


def several():
    return [(torch.randn(s) * 50).to(dtype) for s in SHAPES for dtype in DTYPES] + [torch.randn(6, 4).t()]


def test_tensors_of_the_host_are_given_back():
    tensors = several()
    assert all(a is b for a, b in zip(fetched(tensors), tensors, strict=True))
    assert fetched([]) == []


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on a device, and counts who brings it from there."""

    device = torch.device("cuda", 0)
    copies = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            cls.copies += 1
            return result.as_subclass(torch.Tensor)
        return result


def test_many_come_with_one_copy(monkeypatch):
    monkeypatch.setattr(Elsewhere, "copies", 0)
    tensors = several()
    here = torch.randn(3)
    found = fetched([here, *(t.as_subclass(Elsewhere) for t in tensors)])
    assert Elsewhere.copies == 1
    assert found[0] is here
    for one, expected in zip(found[1:], tensors, strict=True):
        assert type(one) is torch.Tensor
        assert (one.dtype, one.shape) == (expected.dtype, expected.shape)
        assert torch.equal(one.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU")
def test_from_a_gpu():
    tensors = several()
    found = fetched([t.cuda() for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert uploaded([1.5, 2], torch.float64, torch.device("cuda", 0)).tolist() == [1.5, 2]


def test_to_the_host():
    made = uploaded([1.5, 2], torch.float64, torch.device("cpu"))
    assert (made.dtype, made.tolist()) == (torch.float64, [1.5, 2])
    assert sent(made, "cpu") is made
    assert sent(made, "cpu", torch.float32).dtype == torch.float32
