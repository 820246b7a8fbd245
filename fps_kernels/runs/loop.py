"""The training loop of ``fps-kernels tune``: it can be stopped anywhere and goes on with the same bits."""

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fps_kernels.memory import measure
from fps_kernels.runs.folder import RunFolder
from fps_kernels.runs.images import ImageSet, Order, Reading, as_seen_by, in_order, mixed
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.random_state import random_state, restore_random_state, seed_everything
from fps_kernels.runs.state import restore, save
from fps_kernels.runs.stopping import InterruptedRunError, StopSignal
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.tuning.tuner import Tuner


@dataclass(frozen=True)
class Recipe:
    """How to train: what the tuned weights depend on beside the model, the data and the selection."""

    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    lr_dense: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    clip_grad: float | None
    autocast: bool
    augment: str
    crop_scale: float
    seed: int

    def rate(self, step: int, steps: int) -> float:
        """Share of the peak learning rate: rises in equal steps over the warm-up, falls to 0 as a cosine after it."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Habits:
    """What may differ between the parts of one run: how often it is saved, looked at and told of."""

    save_minutes: float
    save_steps: int | None
    log_steps: int
    eval_epochs: int


@dataclass
class Progress:
    """Where a run is, beside its weights.

    Attributes:
        step: steps done.
        evaluated: epochs after which it was evaluated.
        loss: sum over the images since the last record, float64 ``[]``.
        images: their number.
    """

    step: int = 0
    evaluated: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    images: int = 0


class Training:
    """A run from where its folder says it is to its end.

    Args:
        loaded: the model, attached.
        tuner: of the model.
        train: images to tune on.
        test: images to measure on.
        reading: how to read them.
        recipe: how to train.
        habits: how often to save, log and evaluate.
        folder: of the run, held by the first process.
        processes: those that take part.
        on_record: is given every record of the metrics.
        on_step: is told of every step, with the last known training loss.

    Attributes:
        at: where the run is.
        last_loss: of the last record.
        resumed: whether it went on from a saved state.
    """

    def __init__(
        self,
        loaded: Loaded,
        tuner: Tuner,
        train: ImageSet,
        test: ImageSet,
        reading: Reading,
        recipe: Recipe,
        habits: Habits,
        folder: RunFolder,
        processes: Processes,
        on_record: Callable[[dict[str, Any]], None],
        on_step: Callable[[int, float | None], None],
    ) -> None:
        self.loaded, self.tuner, self.test, self.reading = loaded, tuner, test, reading
        self.recipe, self.habits, self.folder, self.processes = recipe, habits, folder, processes
        self.train_images = train
        self.on_record, self.on_step = on_record, on_step
        self.order = Order(len(train), recipe.batch_size, recipe.accumulate, recipe.epochs, recipe.seed)
        groups = tuner.param_groups(lambda name, _: {"lr": recipe.lr_dense if name in tuner.dense else recipe.lr})
        self.optimizer = MaskedAdamW(groups, weight_decay=recipe.weight_decay)
        self._buffers = {name: b.detach().clone() for name, b in loaded.model.named_buffers()}
        self.last_loss: float | None = None
        self._seconds, self._steps, self._images = 0.0, 0, 0  # since the last record, in this process
        seed_everything(recipe.seed if processes.first else mixed(recipe.seed, processes.rank))
        self.at = Progress(loss=torch.zeros((), dtype=torch.float64, device=loaded.device))
        self.resumed = restore(self)
        processes.barrier()  # nobody writes what others still read

    # ------------------------------------------------------------------------------------------------ the run

    def run(self, stop: StopSignal) -> None:
        """Train to the end; the last state is saved then.

        Raises:
            InterruptedRunError: ``stop`` was given; everything up to the last step is saved.
            ValueError: a loss that is not finite, or an image that cannot be read.
        """
        steps, at = self.order.steps, self.at
        self._note_memory()
        scheduler = LambdaLR(self.optimizer, lambda t: self.recipe.rate(t, steps), last_epoch=at.step - 1)
        saved = time.monotonic()
        saved_step = at.step if self.resumed else -1
        with closing(self._batches(at.step)) as batches:  # the processes that read images end with it
            while True:
                due = at.step == steps or time.monotonic() - saved >= 60 * self.habits.save_minutes
                due = due or bool(self.habits.save_steps and at.step and at.step % self.habits.save_steps == 0)
                stopping, due = self.processes.any_of(stop.given, due)
                if not stopping and self._evaluation_is_due():
                    self._evaluate()
                    due, saved_step = True, -1
                if (due or stopping) and at.step != saved_step:
                    self.save()
                    saved, saved_step = time.monotonic(), at.step
                if at.step == steps and not self._evaluation_is_due():
                    return
                if stopping:
                    where = f"at step {at.step:,} of {steps:,}, saved in {self.folder.path}"
                    code = stop.exit_code or 128 + signal.SIGTERM  # others had the signal
                    raise InterruptedRunError(f"{where}: the same command goes on from there", code)
                start = time.perf_counter()
                self._step(batches)
                scheduler.step()
                at.step += 1
                self._steps += 1
                if at.step % self.habits.log_steps == 0 or at.step % self.order.steps_per_epoch == 0:
                    self._record_training(start)
                else:
                    self._seconds += time.perf_counter() - start
                self.on_step(at.step, self.last_loss)

    def _batches(self, step: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        transform = as_seen_by(self.loaded.config, self.recipe.augment, self.recipe.crop_scale)
        return self.reading.batches(
            self.train_images,
            transform,
            lambda: self.processes.parts(self.order.batches_from(step)),
            self.recipe.seed,
        )

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        sizes = self.order.sizes(self.at.step)
        self.loaded.model.train()
        _freeze_running_statistics(self.loaded.model)
        for size in sizes:
            inputs, target = next(batches)
            loss = self._loss(inputs, target)
            if not (own := self.processes.share(size)):
                loss = 0 * loss
            (loss / sum(sizes)).backward()
            self.at.loss += loss.detach().double()
            self.at.images += own
            self._images += size
        self.processes.add_up(self.tuner.parameters())
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.tuner.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Summed over the images."""
        device, dtype = self.loaded.device, self.loaded.dtype
        inputs, target = inputs.to(device, dtype, non_blocking=True), target.to(device, non_blocking=True)
        with self._precision():
            logits = self.loaded.model(inputs)
        return F.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=self.recipe.label_smoothing)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.loaded.device.type, torch.bfloat16, enabled=self.recipe.autocast)

    # ------------------------------------------------------------------------------------------------ metrics

    def _record_training(self, start: float) -> None:
        at = self.at
        loss = self._mean_loss()  # waits for a GPU, so that the time is that of the work
        self._seconds += time.perf_counter() - start
        record = {
            "type": "train",
            "step": at.step,
            "epoch": at.step / self.order.steps_per_epoch,
            "loss": loss,
            "lr": self.recipe.lr * self.recipe.rate(at.step - 1, self.order.steps),
            "step_seconds": self._seconds / self._steps,
            "images_per_second": self._images / self._seconds,
        }
        if self.loaded.device.type == "cuda":
            record["peak_memory"] = torch.cuda.max_memory_allocated(self.loaded.device)
        self._note(record)
        self.last_loss = loss
        at.loss.zero_()
        at.images = 0
        self._seconds, self._steps, self._images = 0.0, 0, 0

    def _mean_loss(self) -> float:
        """Since the last record.

        Raises:
            ValueError: it is not finite.
        """
        images = torch.full_like(self.at.loss, self.at.images)
        summed, count = self.processes.total(torch.stack([self.at.loss, images])).tolist()
        loss: float = summed / max(1.0, count)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.at.step}: try a lower --lr, or --clip-grad 1")
        return loss

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.at.step, self.order.steps_per_epoch)
        if rest or epoch == 0 or self.at.evaluated >= epoch:
            return False
        return epoch == self.recipe.epochs or bool(self.habits.eval_epochs and epoch % self.habits.eval_epochs == 0)

    def _evaluate(self) -> None:
        start = time.perf_counter()
        loss, accuracy = self.evaluate()
        epoch = self.at.step // self.order.steps_per_epoch
        found = {"type": "eval", "step": self.at.step, "epoch": epoch, "loss": loss, "accuracy": accuracy}
        self._note({**found, "images": len(self.test), "seconds": time.perf_counter() - start})
        self.at.evaluated = epoch

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean cross-entropy and the share of test images that are classified correctly."""
        self.loaded.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.loaded.device)
        right = torch.zeros((), dtype=torch.int64, device=self.loaded.device)
        places = in_order(len(self.test), self.recipe.batch_size)
        own = [self.processes.share(len(batch)) for batch in places()]
        parts = self.reading.batches(
            self.test, as_seen_by(self.loaded.config), lambda: self.processes.parts(places()), self.recipe.seed
        )
        for count, (inputs, target) in zip(own, parts, strict=True):
            if not count:
                continue
            inputs, target = inputs.to(self.loaded.device, self.loaded.dtype), target.to(self.loaded.device)
            with self._precision():
                logits = self.loaded.model(inputs).float()
            loss += F.cross_entropy(logits, target, reduction="sum").double()
            right += (logits.argmax(1) == target).sum()
        summed, correct = self.processes.total(torch.stack([loss, right.double()])).tolist()
        return summed / len(self.test), correct / len(self.test)

    def _note_memory(self) -> None:
        """On the CPU: peak of the live tensors in a step on the first images, measured once, apart from the run."""
        if not self.processes.first:
            return
        trained = sum(p.numel() for p in self.tuner.parameters())
        record: dict[str, Any] = {
            "type": "start",
            "step": self.at.step,
            "steps": self.order.steps,
            "device": _device_name(self.loaded.device),
            "trained": trained,
        }
        if self.loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.loaded.device)
        elif self.at.step < self.order.steps:
            transform = as_seen_by(self.loaded.config)
            first = [[(0, i) for i in range(min(self.recipe.batch_size, len(self.train_images)))]]
            places = partial(self.processes.parts, first)
            with closing(self.reading.batches(self.train_images, transform, places, 0)) as batches:
                inputs, target = next(batches)

            def step() -> None:
                self._loss(inputs, target).backward()

            with _undisturbed(self.loaded):
                self.loaded.model.train()
                _freeze_running_statistics(self.loaded.model)
                moments = 8 * trained
                record["peak_memory"] = measure(step, existing=[self.loaded.model]).peak + moments
            self.optimizer.zero_grad()
        self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        if self.processes.first:
            self.folder.record(record)
            self.on_record(record)

    def changed_buffers(self) -> list[str]:
        """Names of buffers that are not as they were, also of those in no ``state_dict``: the run depends on them."""
        now = dict(self.loaded.model.named_buffers())
        return [name for name, b in self._buffers.items() if name in now and not torch.equal(now[name], b)]

    def save(self) -> None:
        """Write everything that the rest of the run depends on.

        Raises:
            ValueError: a loss that is not finite. What was saved before is kept.
        """
        self._mean_loss()
        save(self)


def _freeze_running_statistics(model: nn.Module) -> None:
    """Norm layers stay as they are, as in the protocol of FPS and GPS: also the statistics that some of them keep."""
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()


@contextmanager
def _undisturbed(loaded: Loaded) -> Iterator[None]:
    """Generators of random numbers are afterwards as they were before."""
    before = random_state(loaded.device)
    try:
        yield
    finally:
        restore_random_state(*before, loaded.device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
