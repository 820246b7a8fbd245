"""What an optimizer's step does beside its own: values that it changed go into their weights.

The hooks are the process's, and stay: after a tuner was detached they refuse the steps of its optimizer, whoever made that.
As long as no compact values live they return at once.
"""

from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fps_kernels.tuning.compact_values import LIVING, entries_of
from fps_kernels.tuning.tuned_weight import TunedWeight

_hooked = False


def install_hooks() -> None:
    """Once in a process: every optimizer that steps compact values writes them into their weights afterwards."""
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not LIVING:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(params)
    for p in params:
        if isinstance(p, TunedWeight) and p.entries.values not in held:
            raise ValueError(
                f"the optimizer was made before attach(): it has the frozen weight {p.entries.name} and not its selected "
                "values; make it from tuner.parameters()"
            )
        entries = entries_of(p)
        if entries is not None:
            if not entries.attached:
                raise ValueError(f"the tuner of {entries.name} is detached: this optimizer's steps would reach no weight")
            entries.check_place()
            entries.synchronise()  # a weight that was written directly: the step starts from there


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not LIVING or getattr(optimizer, "writes_attached_weights", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            entries = entries_of(p)
            if entries is not None:
                entries.write_back()  # whether or not they look changed: torch's fused optimizers leave no trace
