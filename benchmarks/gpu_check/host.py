"""What the host does on the way to a device: how long it takes, and whether it waits for it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from benchmarks.gpu_check.models import classifier
from benchmarks.gpu_check.rows import NEEDS_GPU, Row, attempt
from benchmarks.shared.device_timing import Bench
from benchmarks.shared.shapes import entries
from fps_kernels import ops
from fps_kernels.choosing.budgets import Budget


class _Chain(nn.Module):
    """Layers so small that nothing but their launches counts."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def host(bench: Bench, quick: bool) -> Iterator[Row]:
    """Microseconds of the host for a call, a layer and a step; the device is not waited for."""
    device, calls, layers = bench.device, 5 if quick else 200, 24
    x, W = torch.randn(64, 768, device=device), torch.randn(768, 768, device=device)
    acc, a = torch.zeros(768, dtype=torch.float64, device=device), torch.rand(768, device=device)
    csr = entries(1, 768, 768, device)
    runs: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: x @ W,
        "column_norm_": lambda: ops.column_norm_(x, acc, 1.0),
        "score_topk": lambda: ops.score_topk(W, a, 1),
        "sampled_grad": lambda: ops.sampled_grad(x, x, *csr),
    }
    for name, run in runs.items():
        yield attempt({"what": f"a call of {name}"}, lambda run=run: {"us": bench.host_microseconds(run, calls)})  # type: ignore[misc]
    frozen, tuned = _Chain(layers).to(device).requires_grad_(False), _Chain(layers).to(device)
    tuner = fps.attach(tuned, {name: torch.rand(p.shape) < 0.1 for name, p in tuned.named_parameters()})
    x = torch.randn(8, 64, device=device, requires_grad=True)

    def both(model: nn.Module) -> None:
        model(x).sum().backward()

    def a_layer(run: Callable[[nn.Module], object]) -> Row:
        plain, ours = (bench.host_microseconds(partial(run, model), calls) / layers for model in (frozen, tuned))
        return {"us": ours, "of a frozen layer": plain, "added": ours - plain}

    yield attempt({"what": "a layer, forward"}, partial(a_layer, lambda model: model(x)))
    yield attempt({"what": "a layer, forward and backward"}, partial(a_layer, both))
    optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
    yield attempt({"what": f"a step of {layers} weights"}, lambda: {"us": bench.host_microseconds(optimizer.step, calls)})

    def changed() -> None:
        optimizer.param_groups[0]["lr"] *= 0.999
        optimizer.step()

    yield attempt(
        {"what": f"a step of {layers} weights, new learning rate"},
        lambda: {"us": bench.host_microseconds(changed, calls)},
    )


def waits(bench: Bench, quick: bool) -> Iterator[Row]:
    """Whether a step waits for the device, by ``torch.cuda.set_sync_debug_mode``, and how often a choice does."""
    cases = ("a step", "a step, new learning rate", "a step with GradScaler", "a choice, PerNeuron", "a choice, PerTensor")
    if not bench.on_gpu:
        yield from ({"what": case, "waits": NEEDS_GPU} for case in cases)
        return
    model, x, y = classifier("vit_tiny_patch16_224", bench.device, 8, quick)
    budgets: dict[str, Budget] = {cases[3]: fps.PerNeuron(1), cases[4]: fps.PerTensor(0.01)}
    for case, budget in budgets.items():

        def chosen(budget: Budget = budget) -> Row:
            fps.select(model, [x], budget=budget, progress=False)
            with warnings.catch_warnings(record=True) as found, _waiting("warn"):
                warnings.simplefilter("always")
                fps.select(model, [x], budget=budget, progress=False)
            places = [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
            return {"waits": len(places), "where": ", ".join(places)}

        yield attempt({"what": case}, chosen)
    optimizer = fps.MaskedAdamW(fps.attach(model, fps.select(model, [x], progress=False)), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")

    def step(scaled: bool) -> None:
        optimizer.zero_grad()
        if not scaled:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            return
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for case, rate, scaled in ((cases[0], 1.0, False), (cases[1], 0.5, False), (cases[2], 1.0, True)):

        def stepped(rate: float = rate, scaled: bool = scaled) -> Row:
            for _ in range(3):
                step(scaled)
            for group in optimizer.param_groups:
                group["lr"] *= rate
            with _waiting("error"):
                step(scaled)
            return {"waits": 0}

        yield attempt({"what": case}, stepped)


@contextmanager
def _waiting(mode: str) -> Iterator[None]:
    """Inside, torch says where the host waits for the device: by a warning or an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
