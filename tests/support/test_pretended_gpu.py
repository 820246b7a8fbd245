"""The tool that finds waits finds each kind of them, with the line that waits, and nothing else."""

import numpy as np
import pytest
import torch

from tests.support.pretended_gpu import WaitError, pretended_gpu


@pytest.fixture
def gpu():
    with pretended_gpu() as found:
        yield found


def there(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="cuda")


WAITS = {
    "item": lambda: there(1).item(),
    "float": lambda: float(there(1)),
    "a truth value": lambda: bool(there(3).isnan().any()),
    "tolist": lambda: there(3).tolist(),
    "cpu": lambda: there(3).cpu(),
    "to the host, unsynchronised": lambda: there(3).to("cpu", non_blocking=True),
    "copied to the host": lambda: torch.zeros(3).copy_(there(3)),
    "equal": lambda: torch.equal(there(3), there(3)),
    "nonzero": lambda: there(3).nonzero(),
    "where": lambda: torch.where(there(3) > 0),
    "a mask reads": lambda: there(3)[there(3) > 0],
    "a mask writes": lambda: there(3).__setitem__(there(3) > 0, there(3)),
    "masked_select": lambda: there(3).masked_select(there(3) > 0),
    "unique": lambda: there(3, dtype=torch.int64).unique(),
    "unique with inverse": lambda: there(3, dtype=torch.int64).unique(return_inverse=True),
    "unique_consecutive": lambda: there(3, dtype=torch.int64).unique_consecutive(),
    "bincount": lambda: there(3, dtype=torch.int64).bincount(),
    "repeat_interleave": lambda: there(3).repeat_interleave(there(3, dtype=torch.int64)),
    "a number written at a place": lambda: there(3).__setitem__(1, 5.0),
    "read by an index of the host": lambda: there(3)[torch.tensor([0, 2])],
    "read by a list": lambda: there(3)[[0, 2]],
    "made of a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "made of an array": lambda: torch.from_numpy(np.ones(3)).to("cuda"),
    "filled from the host": lambda: there(3).copy_(torch.ones(3)),
    "moved there": lambda: torch.ones(3).to("cuda"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_found_with_its_line(gpu, name):
    with gpu.waiting(0), pytest.raises(WaitError, match=r"in tests/support/test_pretended_gpu\.py:\d+: "):
        WAITS[name]()


def test_what_does_not_wait_passes(gpu):
    with gpu.waiting(0):
        x, places = there(4, 3), there(2, dtype=torch.int64)
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        there(3).copy_(torch.ones(3), non_blocking=True)
        torch.full((), 5.0, device="cuda")
        x[places], x[1:], x[1].fill_(5.0), x[0], x.clone(), x.topk(2), x.to(torch.bfloat16)
        x.repeat_interleave(there(4, dtype=torch.int64), dim=0, output_size=9)
        x.index_put_((places,), there(2, 3), accumulate=True)
        assert torch.ones(3).sum().item() == 3  # of the host
        assert torch.tensor([3, 3, 4]).unique().tolist() == [3, 4]


def test_waits_are_counted_and_answered_with_zeros(gpu):
    with gpu.waiting(2) as waits:
        assert there(3).cpu().tolist() == [0, 0, 0]
        assert there(1).item() == 0
        with pytest.raises(WaitError):
            there(3).cpu()
    assert len(waits) == 3


def test_a_backward_pass_runs_on_the_device(gpu):
    with torch.device("cuda"):
        layer = torch.nn.Linear(3, 2)
    with gpu.waiting(0):
        layer(there(4, 3)).relu().sum().backward()
    assert layer.weight.grad.device == torch.device("cuda", 0)


def test_a_wait_in_a_backward_pass_is_found(gpu):
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gy):
            return gy * gy.sum().item()

    x = there(3).requires_grad_()
    with gpu.waiting(0), pytest.raises(WaitError, match=r"return gy \* gy\.sum\(\)\.item\(\)"):
        Waiting.apply(x).sum().backward()


def test_nothing_is_left_behind():
    before = torch.cuda.current_stream, torch.Tensor.pin_memory
    with pretended_gpu():
        assert torch.cuda.current_stream is not before[0]
    assert (torch.cuda.current_stream, torch.Tensor.pin_memory) == before
