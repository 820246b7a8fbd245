"""Lightning: a callback that chooses, attaches and saves."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import lightning
from lightning.pytorch import callbacks
from torch import nn

from fps_kernels.deltas.making import save_delta
from fps_kernels.selection import Selection
from fps_kernels.tuning.attaching import attach
from fps_kernels.tuning.tuner import Tuner

_AVERAGING = tuple(
    getattr(callbacks, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(callbacks, name)
)


class TuneSelected(lightning.Callback):  # type: ignore[misc]
    """Attaches a choice before the optimizers are made, and writes the delta when the fit ends.

    ``configure_optimizers`` then finds the compact values among the parameters that require gradients:
    ``fps.MaskedAdamW(p for p in self.parameters() if p.requires_grad)``, or any other optimizer.

    Args:
        choose: ``choose(module)`` gives the :class:`fps_kernels.Selection` of the module; names are the module's own.
        delta: where the tuned entries go at the end; nowhere if not given.
        buffers: also hold the buffers that the fit changed, such as the statistics of batch norms; see
            :func:`fps_kernels.save_delta`.

    Attributes:
        tuner: the tuner, from the start of the fit on; it stays attached after it.

    Example:
        >>> tuning = TuneSelected(lambda module: fps.select(module, loader), delta="task.safetensors")
        >>> lightning.Trainer(callbacks=[tuning]).fit(module, loader)
    """

    def __init__(
        self, choose: Callable[[nn.Module], Selection], delta: str | PathLike[str] | None = None, buffers: bool = True
    ) -> None:
        self.choose = choose
        self.delta = delta
        self.buffers = buffers
        self.tuner: Tuner | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called by the trainer before ``configure_optimizers``."""
        if stage == "fit" and self.tuner is None:
            self.tuner = attach(pl_module, self.choose(pl_module))
            for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
                if isinstance(callback, _AVERAGING):  # it has copied the module before there was something to average
                    callback.setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Called by the trainer at the end."""
        if self.delta is not None and self.tuner is not None and trainer.is_global_zero:
            save_delta(self.tuner, self.delta, buffers=self.buffers)
