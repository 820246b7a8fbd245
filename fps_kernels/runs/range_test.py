"""A learning-rate range test: the rate rises from step to step, and the loss tells where it is too high."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fps_kernels.runs.choice import choose
from fps_kernels.runs.images import ImageSet, Order, Reading
from fps_kernels.runs.loss import Loss
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.progress import progress_bar
from fps_kernels.runs.random_state import seed_everything
from fps_kernels.runs.views import as_seen_by
from fps_kernels.selection import Selection
from fps_kernels.tuning.attaching import attach
from fps_kernels.tuning.masked_adamw import MaskedAdamW

if TYPE_CHECKING:
    from fps_kernels.runs.job import Job

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 100
_SMOOTHING = 0.9  # of the loss, as an exponential average
_DIVERGED = 4.0  # times the smallest loss


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        rates: learning rates, rising.
        losses: smoothed, of each rate.
        suggested: a tenth of the rate at which the loss was smallest.
    """

    rates: list[float]
    losses: list[float]
    suggested: float


def find_rate(job: "Job", loaded: Loaded, images: ImageSet, processes: Processes) -> RangeTest:
    """Choose entries, tune for up to 100 steps at rates from 1e-5 to 1 (Smith, WACV 2017, section 3.3), and suggest one.

    The loss is smallest at a rate that is too high to stay at; a tenth of it is the suggestion. Nothing is written, and
    the model is spent.

    Raises:
        ValueError: several processes, or a loss that is not finite at the lowest rate.
    """
    if processes.size > 1:
        raise ValueError("--find-lr runs in one process: leave torchrun out")
    recipe = job.recipe
    reading = Reading(job.workers, loaded.mode, loaded.device.type == "cuda")
    chosen = Selection.load(job.selection) if job.selection else choose(loaded, images, job.choice, reading).selection
    order = Order(len(images), recipe.batch_size, 1, max(1, -(-STEPS * recipe.batch_size // len(images))), recipe.seed)
    loss_of = Loss.of(recipe, len(images.classes), loaded.device)
    seed_everything(recipe.seed)
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    with (
        loaded.present(),
        attach(loaded.model, chosen.to(loaded.device), beside=loaded.files is not None, keep_bits=recipe.keep_bits) as tuner,
        progress_bar() as progress,
    ):
        task = progress.add_task("range test", total=STEPS, status="")
        groups = tuner.param_groups(lambda name, _: {"lr": recipe.lr_head if loaded.is_of_head(name) else LOWEST})
        optimizer = MaskedAdamW(groups, weight_decay=recipe.weight_decay)
        varied = [group for group in optimizer.param_groups if group["lr"] == LOWEST]
        scaler = recipe.scaler(loaded.device)
        transform = as_seen_by(loaded.config, recipe.augmentation)
        batches = reading.batches(images, transform, lambda: order.batches_from(0), recipe.seed)
        for step, (inputs, target) in zip(range(STEPS), batches, strict=False):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            for group in varied:
                group["lr"] = rate
            loaded.model.train()
            x, y = loss_of.mix(inputs.to(loaded.device, loaded.dtype), target.to(loaded.device), step, 0)
            with recipe.precision(loaded.device):
                logits = loaded.model(x)
            loss = loss_of(logits, y) / len(x)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * float(loss.detach())
            smooth = mean / (1 - _SMOOTHING ** (step + 1))
            if not math.isfinite(smooth) or (losses and smooth > _DIVERGED * min(losses)):
                break
            rates.append(rate)
            losses.append(smooth)
            progress.update(task, completed=step + 1, status=f"rate {rate:.1e} loss {smooth:.3f}")
    if not losses:
        raise ValueError("the loss is not finite at the lowest rate")
    return RangeTest(rates, losses, rates[losses.index(min(losses))] / 10)
