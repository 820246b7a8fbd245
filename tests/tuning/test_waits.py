"""A training step does not wait for the GPU: not in the layers, not in the optimizer, whatever changes from step to step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.weights.kinds.embedding import Embedding
from tests.support.models import Classifier, images
from tests.support.pretended_gpu import WaitError, pretended_gpu


@pytest.fixture
def gpu():
    with pretended_gpu() as found:
        yield found


class Attention(nn.Module):
    """Self-attention, cross-attention with a packed weight, and projections of unequal sizes that are rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.grouped = nn.Linear(16, 16 + 2 * 4)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        x = x + self.own(x, x.flip(1), x.roll(1, 1), need_weights=False)[0]
        weight, bias = self.grouped.weight, self.grouped.bias
        q, k, v = F.linear(x, weight[:16], bias[:16]), F.linear(x, weight[16:20]), F.linear(x, weight[20:])
        scores = (q.unflatten(-1, (4, 4)).mean(-2) @ k.mT).softmax(-1)
        return self.out(x + (scores @ v).repeat(1, 1, 4)).mean(1)


class Products(nn.Module):
    """Experts in one weight, heads, signals, volumes, and weights that are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.heads = nn.Parameter(torch.randn(12, 2, 4) * 0.3)
        self.signal, self.up = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 2, 2)
        self.volume = nn.Conv3d(8, 8, (2, 1, 1))
        self.normal = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(3, -1, -1), self.experts).mean(0)
        y = torch.einsum("tc,chd->htd", y, self.heads).permute(0, 2, 1).reshape(1, 8, -1)
        y = self.up(self.signal(y))
        y = self.volume(self.normal(y).unflatten(2, (2, -1)).unsqueeze(-1)).flatten(2)
        return self.out(y.mean(2)).expand(6, 5)


class Words(nn.Module):
    """Rows that are looked up, with one for padding, and an output layer that shares them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, padding_idx=0)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).mean(1))


class Convolutions(nn.Module):
    """Dense, strided, grouped and dilated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same", groups=4), nn.GELU(), nn.Conv2d(8, 8, 3)
        )
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x).mean((2, 3)))


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Every fifth entry of every matrix, and of the first half of its columns only: not every column is needed."""
    found = {}
    for name, p in model.named_parameters():
        if p.dim() > 1 and "position" not in name and not name.endswith("original0"):
            mask = torch.zeros(p.shape, dtype=torch.bool)
            mask.flatten(1)[::2, : max(1, mask[0].numel() // 2) : 3] = True
            found[name] = mask
    return found


MODELS = {
    "linear": (Classifier, lambda: images(6)),
    "convolution": (Convolutions, lambda: images(6)),
    "attention": (Attention, lambda: torch.randn(6, 5, 16)),
    "embedding": (Words, lambda: torch.randint(50, (6, 7))),
    "products": (Products, lambda: torch.randn(6, 8)),
}
ROW_DIMS = {"experts": (0, 2), "heads": (1, 2), "up.weight": (1,)}  # where they are not the first


def made(gpu, kind, dtype=torch.float32):
    """A model on the device, with its tuner, and an input and targets there."""
    create, batch = MODELS[kind]
    chosen = {name: fps.WeightSelection.from_mask(m, ROW_DIMS.get(name, (0,))) for name, m in masks(create()).items()}
    selection = fps.Selection(chosen)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model, x, y = create(), batch(), torch.zeros(6, dtype=torch.int64)
    finally:
        torch.set_default_dtype(torch.float32)
    return model, fps.attach(model, selection), x, y


def backward(model, x, y, scale=1.0):
    loss = F.cross_entropy(model(x).float(), y)
    (loss * scale).backward()
    return loss


@pytest.mark.parametrize("zero", ["to none", "in place", "by the step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_with_a_scheduler_does_not_wait(gpu, kind, dtype, zero):
    """From the first step on, with a learning rate that is another in each."""
    with gpu.waiting(None):
        model, tuner, x, y = made(gpu, kind, dtype)
        optimizer = fps.MaskedAdamW(tuner, lr=1e-3, zero_grads=zero == "by the step")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with gpu.waiting(0):
        for _ in range(4):
            if zero != "by the step":
                optimizer.zero_grad(set_to_none=zero == "to none")
            backward(model, x, y)
            gpu.driver.launches.clear()
            optimizer.step()
            scheduler.step()
        assert gpu.launches == ["_masked_adamw"]
        assert len({group["lr"] for group in optimizer.param_groups} | {1e-3}) == 2


@pytest.mark.parametrize("kind", MODELS)
def test_attach_waits_twice_whatever_the_number_of_weights(gpu, kind):
    """For the choice, if it lies there, and for a sample of the weights by which models are told apart."""
    create, _ = MODELS[kind]
    selection = fps.Selection.from_masks(masks(create()))
    with torch.device("cuda"):
        model = create()
    with gpu.waiting(2) as waits:
        fps.attach(model, selection)
    assert len(waits) == 1


def test_an_optimizer_is_made_with_one_wait(gpu):
    """For what tells one choice from another in its state."""
    with gpu.waiting(None):
        _, tuner, _, _ = made(gpu, "attention")
    with gpu.waiting(1):
        fps.MaskedAdamW(tuner)


def test_micro_batches_clipping_and_an_average_do_not_wait(gpu):
    with gpu.waiting(None):
        model, tuner, x, y = made(gpu, "linear")
        optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
        average = torch.zeros((), device="cuda")
    with gpu.waiting(0):
        for _ in range(3):
            optimizer.zero_grad()
            for piece, target in zip(x.split(2), y.split(2), strict=True):
                average += backward(model, piece, target, 1 / 3).detach()
            nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
            optimizer.step()


def test_a_grad_scaler_does_not_wait(gpu):
    with gpu.waiting(None):
        model, tuner, x, y = made(gpu, "linear")
        optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
        scaler = torch.amp.GradScaler("cuda")
    assert scaler.is_enabled()
    with gpu.waiting(0):
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("where", ["number", "on the device", "on the host", "capturable"])
def test_no_kind_of_learning_rate_waits(gpu, where):
    with gpu.waiting(None):
        model, tuner, x, y = made(gpu, "linear")
        lr = {"on the device": torch.full((), 1e-3, device="cuda"), "on the host": torch.tensor(1e-3)}.get(where, 1e-3)
        optimizer = fps.MaskedAdamW(tuner, lr=lr, capturable=where == "capturable")
    with gpu.waiting(0):
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
            if isinstance(lr, Tensor):
                lr.mul_(0.9)


def test_gradients_in_another_memory_format_take_the_general_way_and_do_not_wait(gpu):
    """No plan can be kept of them, so that the numbers go to the device anew in each step."""
    chosen = masks(Convolutions())
    with gpu.waiting(None):
        with torch.device("cuda"):
            model = Convolutions()
            first = torch.empty(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
        model.layers[0].weight = nn.Parameter(first)
        optimizer = fps.MaskedAdamW(fps.masked_parameters(model, chosen), lr=1e-3)
    with gpu.waiting(0):
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros(p.shape, device="cuda")
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    assert optimizer._plans is None


@pytest.mark.parametrize("create", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_torchs_optimizers_do_not_wait_for_us(gpu, create):
    """Values that another optimizer changed go into their weights without a wait."""
    with gpu.waiting(None):
        model, tuner, x, y = made(gpu, "linear")
        optimizer = create(
            tuner.parameters(), lr=1e-3, foreach=True, **({"capturable": True} if create is torch.optim.AdamW else {})
        )
    with gpu.waiting(0):
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, x, y)
            gpu.driver.launches.clear()
            optimizer.step()
        assert gpu.launches == ["_agree_values"] * 2


def test_a_wait_that_is_planted_in_a_layer_is_found(gpu, monkeypatch):
    sampled = Embedding.sampled_gradient

    def waiting(self, gy, x, row_offsets, columns):
        x.unique()
        return sampled(self, gy, x, row_offsets, columns)

    with gpu.waiting(None):
        model, _, x, y = made(gpu, "embedding")
    monkeypatch.setattr(Embedding, "sampled_gradient", waiting)
    with gpu.waiting(0), pytest.raises(WaitError, match="x.unique()"):
        backward(model, x, y)
