"""The training loop of ``fps-kernels tune``: it can be stopped anywhere and goes on with the same bits."""

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fps_kernels.memory import measure
from fps_kernels.runs.averaging import Average, show, values_of
from fps_kernels.runs.evaluation import Evaluation, evaluate
from fps_kernels.runs.folder import RunFolder
from fps_kernels.runs.images import ImageSet, Order, Reading, mixed
from fps_kernels.runs.loss import Loss
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.random_state import random_state, restore_random_state, seed_everything
from fps_kernels.runs.recipe import Habits, Recipe
from fps_kernels.runs.splits import Splits
from fps_kernels.runs.state import restore, restore_best, save, save_best
from fps_kernels.runs.stopping import InterruptedRunError, StopSignal
from fps_kernels.runs.views import as_seen_by
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.tuning.tuner import Tuner


@dataclass
class Progress:
    """Where a run is, beside its weights.

    Attributes:
        step: steps done.
        evaluated: epochs after which it was evaluated.
        best: accuracy on the validation images of the best evaluation so far, -1 before the first one.
        best_loss: its loss, which decides between equal accuracies; ``None`` before the first one.
        best_epoch: its epoch.
        waited: evaluations since then.
        loss: sum over the images since the last record, float64 ``[]``.
        images: their number.
    """

    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    best_loss: float | None = None
    best_epoch: int = 0
    waited: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    images: int = 0

    def is_improved_by(self, accuracy: float, loss: float) -> bool:
        """Whether an evaluation is better than all before: more accurate, or as accurate with a lower loss."""
        return self.best_loss is None or (accuracy, -loss) > (self.best, -self.best_loss)


class Training:
    """A run from where its folder says it is to its end.

    Args:
        loaded: the model, attached.
        tuner: of the model.
        splits: images to tune on, to choose by and to measure on.
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
        last_evaluation: of this process, ``None`` before the first one.
        resumed: whether it went on from a saved state.
    """

    def __init__(
        self,
        loaded: Loaded,
        tuner: Tuner,
        splits: Splits,
        reading: Reading,
        recipe: Recipe,
        habits: Habits,
        folder: RunFolder,
        processes: Processes,
        on_record: Callable[[dict[str, Any]], None],
        on_step: Callable[[int, float | None], None],
    ) -> None:
        self.loaded, self.tuner, self.splits, self.reading = loaded, tuner, splits, reading
        self.recipe, self.habits, self.folder, self.processes = recipe, habits, folder, processes
        self.on_record, self.on_step = on_record, on_step
        self.order = Order(len(splits.train), recipe.batch_size, recipe.accumulate, recipe.epochs, recipe.seed)
        groups = tuner.param_groups(lambda name, _: {"lr": recipe.lr_head if loaded.is_of_head(name) else recipe.lr})
        self.optimizer = MaskedAdamW(groups, weight_decay=recipe.weight_decay)
        self._buffers = {name: b.detach().clone() for name, b in loaded.model.named_buffers()}
        self.last_loss: float | None = None
        self.last_evaluation: Evaluation | None = None
        self._seconds, self._steps, self._images = 0.0, 0, 0  # since the last record, in this process
        seed_everything(recipe.seed if processes.first else mixed(recipe.seed, processes.rank))
        self.average = Average(tuner, recipe.ema) if recipe.ema else None
        self.loss = Loss.of(recipe, len(splits.train.classes), loaded.device)
        self.scaler = recipe.scaler(loaded.device)
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
                due = self.ended or time.monotonic() - saved >= 60 * self.habits.save_minutes
                due = due or bool(self.habits.save_steps and at.step and at.step % self.habits.save_steps == 0)
                stopping, due = self.processes.any_of(stop.given, due)
                if not stopping and self._evaluation_is_due():
                    self._evaluate()
                    due, saved_step = True, -1
                if (due or stopping) and at.step != saved_step:
                    self.save()
                    saved, saved_step = time.monotonic(), at.step
                if self.ended and not self._evaluation_is_due():
                    return
                if stopping:
                    where = f"at step {at.step:,} of {steps:,}, saved in {self.folder.path}"
                    code = stop.exit_code or 128 + signal.SIGTERM  # others had the signal
                    raise InterruptedRunError(f"{where}: the same command goes on from there", code)
                start = time.perf_counter()
                self._step(batches)
                scheduler.step()
                if self.average is not None:
                    self.average.update(at.step)
                at.step += 1
                self._steps += 1
                if at.step % self.habits.log_steps == 0 or at.step % self.order.steps_per_epoch == 0:
                    self._record_training(start)
                else:
                    self._seconds += time.perf_counter() - start
                self.on_step(at.step, self.last_loss)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or so many evaluations were no better that no further step is."""
        patience = self.recipe.patience
        return self.at.step == self.order.steps or (patience is not None and self.at.waited >= patience)

    def _batches(self, step: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        transform = as_seen_by(self.loaded.config, self.recipe.augmentation)
        return self.reading.batches(
            self.splits.train,
            transform,
            lambda: self.processes.parts(self.order.batches_from(step)),
            self.recipe.seed,
        )

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        sizes = self.order.sizes(self.at.step)
        self.loaded.model.train()
        _freeze_running_statistics(self.loaded.model)
        for place, size in enumerate(sizes):
            inputs, target = next(batches)
            loss = self._loss(*self.loss.mix(inputs, target, self.at.step, place))
            if not (own := self.processes.share(size)):
                loss = 0 * loss
            self.scaler.scale(loss / sum(sizes)).backward()
            self.at.loss += loss.detach().double()
            self.at.images += own
            self._images += size
        self.processes.add_up(self.tuner.parameters())
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.tuner.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Summed over the images."""
        device, dtype = self.loaded.device, self.loaded.dtype
        inputs, target = inputs.to(device, dtype, non_blocking=True), target.to(device, non_blocking=True)
        with self.recipe.precision(device):
            logits = self.loaded.model(inputs)
        return self.loss(logits, target)

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
        if self.recipe.keep == "best" or self.recipe.patience is not None:
            return True
        return epoch == self.recipe.epochs or bool(self.habits.eval_epochs and epoch % self.habits.eval_epochs == 0)

    def _evaluate(self) -> None:
        start = time.perf_counter()
        with self.measured():
            found = self.evaluate(self.splits.watched)
            epoch = self.at.step // self.order.steps_per_epoch
            if self.splits.validation is not None:
                self._compare(found, epoch)
        record = {"type": "eval", "step": self.at.step, "epoch": epoch, "loss": found.loss, "accuracy": found.accuracy}
        record |= {} if found.top5 is None else {"top5": found.top5}
        record["split"] = "test" if self.splits.validation is None else "validation"
        self._note({**record, "images": found.images, "seconds": time.perf_counter() - start})
        self.at.evaluated = epoch
        self.last_evaluation = found

    def _compare(self, found: Evaluation, epoch: int) -> None:
        """Keep what is measured, if it is better than all before."""
        at = self.at
        if not at.is_improved_by(found.accuracy, found.loss):
            at.waited += 1
            return
        at.best, at.best_loss, at.best_epoch, at.waited = found.accuracy, found.loss, epoch, 0
        if self.recipe.keep == "best" and self.processes.first:
            save_best(self)

    def measured(self) -> AbstractContextManager[None]:
        """A context in which the model is what is measured and written: the average, where there is one."""
        return nullcontext() if self.average is None else self.average.shown()

    def evaluate(self, images: ImageSet) -> Evaluation:
        """The model as it is, on some images."""
        precision = self.recipe.precision(self.loaded.device)
        return evaluate(self.loaded, images, self.reading, self.recipe.batch_size, self.processes, precision)

    @contextmanager
    def result(self) -> Generator[None, None, None]:
        """Inside, the model is what the run came to: the best epoch, if that is to be kept, or the last one."""
        if self.recipe.keep == "best":
            before = values_of(self.tuner)
            self.processes.barrier()  # the first one may be writing it
            restore_best(self)
            try:
                yield
            finally:
                show(self.tuner, before)
        else:
            with self.measured():
                yield

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
            first = [[(0, i) for i in range(min(self.recipe.batch_size, len(self.splits.train)))]]
            places = partial(self.processes.parts, first)
            with closing(self.reading.batches(self.splits.train, transform, places, 0)) as batches:
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
