"""transformers: what ``Trainer`` needs to tune a choice, and a small file at each of its checkpoints."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fps_kernels.deltas.making import save_delta
from fps_kernels.tuning.masked_adamw import MaskedAdamW
from fps_kernels.tuning.tuner import Tuner

DELTA_FILE = "delta.safetensors"


def masked_adamw(tuner: Tuner, args: TrainingArguments) -> MaskedAdamW:
    """:class:`fps_kernels.MaskedAdamW` with the rates of ``TrainingArguments``.

    As in ``Trainer``, biases have no weight decay; compact values and other dense weights have it.

    Args:
        tuner: from :func:`fps_kernels.attach`.
        args: its ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are used.

    Example:
        >>> trainer = Trainer(model, args, optimizers=(masked_adamw(tuner, args), None), train_dataset=data)
    """

    def options(name: str, p: nn.Parameter) -> dict[str, float]:
        return {"weight_decay": 0.0 if name.endswith("bias") else args.weight_decay}

    return MaskedAdamW(
        tuner.param_groups(options),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


class SaveDelta(TrainerCallback):  # type: ignore[misc]
    """Writes ``delta.safetensors`` into every checkpoint of a ``Trainer``, and into its output folder at the end.

    Args:
        tuner: from :func:`fps_kernels.attach`.
        buffers: also hold the buffers that training changed, such as the statistics of batch norms; see
            :func:`fps_kernels.save_delta`.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[SaveDelta(tuner)], train_dataset=data)
        >>> trainer.train()
        >>> fps.load_delta("output/delta.safetensors").apply_(base_model)
    """

    def __init__(self, tuner: Tuner, buffers: bool = True) -> None:
        self.tuner = tuner
        self.buffers = buffers

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by ``Trainer`` after a checkpoint was written."""
        self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by ``Trainer`` at the end."""
        self._save(Path(args.output_dir), state)

    def _save(self, folder: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero or self.tuner.is_sharded:  # of which every process has a part
            save_delta(self.tuner, folder / DELTA_FILE, buffers=self.buffers)
