"""Plain torch in place of each op, and the optimizer's op ready to be called: what takes turns when ops are timed."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels import ops
from fps_kernels.weights.matrix import MatrixLayout

Csr = tuple[Tensor, Tensor]
# A cache line each to read the gradient, to read the weight and to write it; the rest is the column and both moments.
BYTES_PER_STEPPED_ENTRY = 3 * 64 + 28


def column_norm(x: Tensor) -> Tensor:
    """Of ``ops.column_norm_`` with ``ord=1``."""
    return x.abs().sum(0)


def column_norm_conv2d(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Of ``ops.column_norm_conv2d_`` with ``ord=1`` and square kernels."""
    return F.unfold(x, size, 1, padding, stride).abs().sum((0, 2))


def topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """Of ``ops.score_topk``; the columns in order of their scores."""
    return (W.abs() * a).topk(k).indices


def scores(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """What the ops never store."""
    return [W.abs() * a for W, a in zip(weights, factors, strict=True)]


def kth(scores: Sequence[Tensor], k: int) -> Tensor:
    """Of ``ops.score_kth``, once there are scores."""
    return torch.cat([s.flatten() for s in scores]).topk(k).values[-1]


def at_least(scores: Sequence[Tensor], threshold: Tensor) -> list[tuple[Tensor, ...]]:
    """Of ``ops.score_select``, once there are scores: rows and columns."""
    return [(s >= threshold).nonzero(as_tuple=True) for s in scores]


def dense_gradient(gy: Tensor, x: Tensor) -> Tensor:
    """Of ``ops.sampled_grad``: every entry."""
    return gy.t() @ x


def masked_step(
    weights: Sequence[Tensor], grads: Sequence[Tensor], choices: Sequence[Csr], lr: float, weight_decay: float
) -> Callable[[], None]:
    """A call of ``ops.masked_adamw_`` on float32 weights, with the state of an optimizer that has just begun."""
    n = len(weights)
    state = [[torch.zeros(columns.numel()) for _, columns in choices] for _ in range(2)]
    steps = [torch.zeros(()) for _ in choices]
    masters = [torch.empty(0)] * n
    offsets, columns = ([choice[i] for choice in choices] for i in range(2))
    lrs, decays = torch.full((n,), lr, dtype=torch.float64), [weight_decay] * n
    fixed = (0.9, 0.999, 1e-8, False, None, None, False)
    return lambda: ops.masked_adamw_(weights, grads, offsets, columns, masters, *state, steps, lrs, decays, *fixed)


def beside_and_lora(inputs: int, outputs: int, k: int, rank: int) -> tuple[nn.Module, nn.Module]:
    """A frozen linear layer with ``k`` entries a neuron beside it, in a fifth of the columns, and one with PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    made = []
    for _ in range(2):
        model = nn.Module()
        model.layer = nn.Linear(inputs, outputs)
        model.forward = model.layer.forward
        made.append(model)
    ours, theirs = made
    used = torch.randperm(inputs)[: inputs // 5]
    columns = torch.stack([used[torch.randperm(len(used))[:k]].sort().values for _ in range(outputs)]).flatten().int()
    offsets = torch.arange(outputs + 1, dtype=torch.int32) * k
    entries = fps.WeightSelection(MatrixLayout((outputs, inputs)), offsets, columns)
    fps.attach(ours, fps.Selection({"layer.weight": entries}, ()), beside=True)
    lora = get_peft_model(theirs, LoraConfig(r=rank, target_modules=["layer"], lora_dropout=0.0))
    return ours.layer, lora.base_model.model.layer


def there_and_back(layer: nn.Module, x: Tensor) -> None:
    """A forward and a backward pass with a gradient for the input, as inside of a network."""
    y = layer(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))
    for p in layer.parameters():
        p.grad = None
