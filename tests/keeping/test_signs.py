"""What asks only on which side of zero a number is: one bit each, exact gradients, and nobody else is told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.keeping.packed import Groups, Signs


def images(dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(4, 16, 15, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[::7] = 0
    x.view(-1)[5:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    return x.contiguous(memory_format=memory_format)


FUNCTIONS = {
    "relu": lambda x: F.relu(x * 1),
    "in place": lambda x: F.relu_(x * 1),
    "leaky, in place": lambda x: F.leaky_relu_(x * 1, 0.1),
    "of a view": lambda x: F.relu((x * 1)[:, 2:9, 1:]),
    "in place, of a view": lambda x: F.relu_((x * 1)[:, 2:9, 1:]),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_same_bits(name, dtype, memory_format):
    function = FUNCTIONS[name]
    x = images(dtype, memory_format)
    if "leaky" in name:
        x.nan_to_num_()
    x.requires_grad_()
    exact = function(x)
    with fps.kept():
        y = function(x)
    assert torch.equal(exact.nan_to_num(7), y.nan_to_num(7))
    gy = torch.randn(y.shape, dtype=dtype)
    (expected,), (found,) = (torch.autograd.grad(out, x, gy) for out in (exact, y))
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_one_bit_a_number():
    x = images().requires_grad_()
    with fps.kept():
        y = F.relu(x * 1)
    packed = y.grad_fn._raw_saved_result.data.packed
    assert isinstance(packed, Signs)
    assert sum(part.nbytes for part in packed._parts) == x.numel() // 8


def test_an_operation_that_is_given_the_output_keeps_its_numbers():
    """Also where the node has let go of its own, and where its output was made outside."""
    x = torch.randn(4, 16, 15, 13, requires_grad=True)
    with fps.kept():
        y = F.relu(x * 1)
        product = y * y.detach().clone().requires_grad_()
    assert type(product.grad_fn._raw_saved_self.data.packed._parts[0]) is torch.Tensor
    assert isinstance(product.grad_fn._raw_saved_self.data.packed, Groups)
    product.sum().backward(retain_graph=False)
    outside = F.relu(x * 1)
    with fps.kept():
        for again in (y, outside):
            square = again.square()
            packed = square.grad_fn._raw_saved_self.data.packed
            assert isinstance(packed, Groups)
            assert float((packed.tensor() - again.detach()).norm()) < 0.01 * float(again.detach().norm())


def test_second_derivatives():
    x = torch.randn(20_000, requires_grad=True)

    def second(keeping):
        with keeping:
            y = F.relu(x * 1).pow(3)
            (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    exact, found = second(torch.enable_grad()), second(fps.kept())
    assert float((found - exact).norm()) < 0.02 * float(exact.norm())


def convnet() -> nn.Sequential:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

    torch.manual_seed(0)
    return nn.Sequential(*block(8, 32), *(part for _ in range(11) for part in block(32, 32)), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize("attached", [False, True])
def test_a_convolutional_network(attached):
    """Little more than a third of the memory; the gradient is off by what 8 bits of inputs cost, not by flipped signs."""
    x = torch.randn(4, 8, 24, 24, generator=torch.Generator().manual_seed(1))
    found = {}
    for bits in (None, 8):
        model = convnet()
        model(x)
        keeping = fps.kept() if bits else torch.enable_grad()
        if attached:
            selection = fps.select(model, [x], budget=fps.PerNeuron(4), progress=False)
            fps.attach(model, selection, keep_bits=bits)
            keeping = torch.enable_grad()

        def forward(model=model, keeping=keeping):
            with keeping:
                return model(x)

        added = fps.memory.measure(forward, existing=[model, x]).added
        forward().square().mean().backward()
        found[bits] = added, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (plain, exact), (packed, grads) = found[None], found[8]
    assert packed < (0.45 if attached else 0.38) * plain
    off = sum(float((grads[name] - g).square().sum()) for name, g in exact.items())
    assert 0 < off < 0.02**2 * sum(float(g.square().sum()) for g in exact.values())
