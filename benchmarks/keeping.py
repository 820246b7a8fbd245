"""What keeping activations in fewer bits does to gradients, operation by operation: ``python -m benchmarks.keeping``.

Gradients of each operation's inputs, for a random gradient of its output, against the same in float64: the error's norm
over the gradient's. Inputs have the size of ViT-B's at batch 2; every channel has a scale of its own, drawn from a lognormal
distribution, as those of pretrained networks differ. Beside float32 with 8 and with 4 bits stand float32 and bfloat16 as
they are: where 8 bits are off by less than bfloat16, who trains in bfloat16 loses nothing that was not lost.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import fps_kernels as fps
from benchmarks.shared.measuring import save, table
from fps_kernels.keeping.packed import Groups

Operation = Callable[..., Tensor]
ROWS, WIDTH, HEADS = 394, 768, 12


def activations(*shape: int) -> Tensor:
    """Float32 numbers whose channels, in the last dimension, have scales that differ."""
    return torch.randn(shape) * torch.randn(shape[-1]).exp()


def heads() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, as views of one tensor."""
    q, k, v = activations(2, ROWS // 2, 3 * WIDTH).view(2, ROWS // 2, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    return q, k, v


def operations() -> dict[str, tuple[Operation, tuple[Tensor, ...]]]:
    """Each by what it keeps, with its inputs."""
    x, hidden = activations(ROWS, WIDTH), activations(ROWS, 4 * WIDTH)
    images = activations(4, 28, 28, 64).permute(0, 3, 1, 2)
    weight = torch.randn(64, 64, 3, 3) * 0.05
    scores = activations(2 * HEADS, ROWS // 2, ROWS // 2)

    def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

    return {
        "GELU: its input": (F.gelu, (hidden,)),
        "GELU by tanh: its input": (lambda x: F.gelu(x, approximate="tanh"), (hidden,)),
        "SiLU: its input": (F.silu, (hidden,)),
        "ReLU: signs of its output": (F.relu, (hidden,)),
        "LeakyReLU: its input": (F.leaky_relu, (hidden,)),
        "ReLU6: its input": (F.relu6, (hidden,)),
        "logarithm: its input": (torch.log, (hidden.square() + 0.1,)),
        "sigmoid: its output": (torch.sigmoid, (x,)),
        "tanh: its output": (torch.tanh, (x,)),
        "LayerNorm: its input, exact mean and scale": (lambda x: F.layer_norm(x, (WIDTH,)), (x,)),
        "RMSNorm: its input": (lambda x: F.rms_norm(x, (WIDTH,)), (x,)),
        "GroupNorm: its input, exact mean and scale": (lambda x: F.group_norm(x, 8), (images,)),
        "softmax: its output": (lambda s: s.softmax(-1), (scores,)),
        "attention, fused: q, k, v and its output": (F.scaled_dot_product_attention, heads()),
        "attention by products and softmax": (explicit_attention, heads()),
        "product of two activations": (torch.mul, (x, activations(ROWS, WIDTH))),
        "linear, gradient of the weight: its input": (F.linear, (x, torch.randn(WIDTH, WIDTH) * 0.02)),
        "convolution, gradient of the weight: its input": (lambda x, w: F.conv2d(x, w, padding=1), (images, weight)),
        "dropout: its mask": (lambda x: F.dropout(x, 0.1), (x,)),
        "max pooling: indices": (lambda x: F.max_pool2d(x, 2), (images,)),
        "log-softmax (left as it is)": (lambda s: s.log_softmax(-1), (scores,)),
        "square root (left as it is)": (lambda x: (x.square() + 0.1).sqrt(), (x,)),
    }


def gradients(
    function: Operation, inputs: tuple[Tensor, ...], dtype: torch.dtype, keeping: AbstractContextManager[object]
) -> list[Tensor]:
    """Of all inputs, for the same random gradient of the output."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    torch.manual_seed(1)  # of dropout
    with keeping:
        # An activation is the result of something; a weight is a parameter.
        y = function(*(leaf if i and leaf.shape[0] == leaf.shape[1] else leaf * 1 for i, leaf in enumerate(leaves)))
    torch.manual_seed(2)
    return list(torch.autograd.grad(y, leaves, torch.randn(y.shape).to(dtype)))


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference over the norm, of all gradients together."""
    off = sum(float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return (off / sum(float(b.square().sum()) for b in exact)) ** 0.5


@contextmanager
def four_bits() -> Iterator[None]:
    """Half of the bits, which the library does not offer."""
    Groups.BITS = 4
    try:
        yield
    finally:
        Groups.BITS = 8


def rows() -> Iterator[dict[str, object]]:
    """A row for each operation."""
    torch.manual_seed(0)
    for name, (function, inputs) in operations().items():
        exact = gradients(function, inputs, torch.float64, nullcontext())
        found = {
            "float32": error(gradients(function, inputs, torch.float32, nullcontext()), exact),
            "float32_8_bits": error(gradients(function, inputs, torch.float32, fps.kept()), exact),
            "bfloat16": error(gradients(function, inputs, torch.bfloat16, nullcontext()), exact),
            "bfloat16_8_bits": error(gradients(function, inputs, torch.bfloat16, fps.kept()), exact),
        }
        with four_bits():
            found["float32_4_bits"] = error(gradients(function, inputs, torch.float32, fps.kept()), exact)
        yield {"operation": name, **found}


HEAD = ("float32", "float32_8_bits", "float32_4_bits", "bfloat16", "bfloat16_8_bits")


def main() -> None:
    """Print the table, write ``results/keeping.json``."""
    found = list(rows())
    print(table(["operation", *HEAD], [[str(row["operation"]), *(f"{row[key]:.1e}" for key in HEAD)] for row in found]))
    save("keeping", "python -m benchmarks.keeping", found)


if __name__ == "__main__":
    main()
