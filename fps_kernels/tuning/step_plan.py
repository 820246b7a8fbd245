"""What a step of :class:`~fps_kernels.MaskedAdamW` tells the kernel, kept from the step before.

To ask a hundred tensors where they lie and what they are costs more than to step them. A plan remembers; the next step
compares what may have changed, and takes the general way, which checks everything and makes a new plan, where anything has.
"""

from collections.abc import Mapping, Sequence
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.tuning.agreement import note_written
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.places import Place, all_there
from fps_kernels.tuning.tuner import Tuner
from fps_kernels.weights.shards import local_part

_overrides_off = torch._C.DisableTorchFunctionSubclass
_dispatch_modes = torch._C._len_torch_dispatch_stack


Coefficients = tuple[float, float, float, bool]  # beta1, beta2, eps, maximize


class Member(NamedTuple):
    """A parameter that takes part in a step.

    Attributes:
        parameter: whose gradient is read.
        entries: of the attached weight whose values it is, if it is.
        group: its group of parameters.
        state: what the optimizer keeps of it.
        gradient: as a matrix, or one number for each entry.
        memory: the weight as a matrix and the CSR of the entries there.
        master: what holds the values; empty where the weight itself does.
    """

    parameter: nn.Parameter
    entries: SelectedEntries | None
    group: dict[str, Any]
    state: dict[str, Any]
    gradient: Tensor
    memory: tuple[Tensor, Tensor, Tensor]
    master: Tensor


STATE = ("step", "exp_avg", "exp_avg_sq", "master")


class StepPlan:
    """One call of the kernel: parameters of one device and of equal coefficients.

    Args:
        members: those that have a gradient.
        coefficients: of their groups.

    Attributes:
        device: of the parameters.
        groups: of each of them.
        parameters: the members'.
        entries: those of attached weights.
        repeats: whether another step can be told of in the same way.
    """

    def __init__(self, members: Sequence[Member], coefficients: Coefficients) -> None:
        self._coefficients = coefficients
        self.device = members[0].parameter.device
        self.groups = [m.group for m in members]
        self.parameters = [m.parameter for m in members]
        self.entries = [m.entries for m in members if m.entries is not None]
        with _overrides_off():
            self._sharded = any(local_part(p) is not p for p in self.parameters)
            grads = [local_part(p.grad) for p in self.parameters if p.grad is not None]
            # A copy of a gradient whose memory format differs from the weight's is another one in every step, and one that
            # was expanded from few numbers will hardly come again.
            self.repeats = all(
                m.gradient.data_ptr() == g.data_ptr() and 0 not in g.stride() and (g.dim() > 1 or g.is_contiguous())
                for m, g in zip(members, grads, strict=True)
            )
            if not self.repeats:
                return
            self._nothing, self._strided = [None] * len(grads), [torch.strided] * len(grads)
            self._dtypes, self._strides = [g.dtype for g in grads], [g.stride() for g in grads]
            self._seen = [e.seen for e in self.entries]
            self._touched = [*map(local_part, self.parameters), *(seen.stored for seen in self._seen)]
            self._addresses = [t.data_ptr() for t in self._touched]
            self._states = [m.state for m in members]
            self._tensors = {key: [state.get(key) for state in self._states] for key in STATE}
            self._prepared = ops.prepared_adamw(
                [m.memory[0] for m in members],
                [m.gradient for m in members],
                [m.memory[1] for m in members],
                [m.memory[2] for m in members],
                [m.master.detach() for m in members],
                [m.state["exp_avg"] for m in members],
                [m.state["exp_avg_sq"] for m in members],
                [m.state["step"] for m in members],
                [torch.empty(0, device=self.device) if m.entries is None else m.entries.agreed for m in members],
            )

    def gradients(self) -> list[int] | None:
        """Where the gradients lie, or ``None`` where the plan is out of date. Overrides have to be off."""
        # Lists and nothing else: a hundred tensors are asked six things each.
        grads: list[Any] = [p.grad for p in self.parameters]
        if not all(map(is_not, grads, self._nothing)):
            return None
        if self._sharded:
            grads = [local_part(g) for g in grads]
        if [g.layout for g in grads] != self._strided:
            return None
        if [g.dtype for g in grads] != self._dtypes or [g.stride() for g in grads] != self._strides:
            return None
        if [t.data_ptr() for t in self._touched] != self._addresses:
            return None
        for key, tensors in self._tensors.items():
            if not all(map(is_, [state.get(key) for state in self._states], tensors)):
                return None
        return [g.data_ptr() for g in grads]

    def note(self) -> None:
        """The kernel has changed values and weights alike."""
        note_written(self._touched, self._seen)

    def run(
        self, gradients: list[int], lrs: Tensor | list[float], scale: Tensor | None, skip: Tensor | None, zero_grads: bool
    ) -> None:
        """Take the step."""
        decays = [group["weight_decay"] for group in self.groups]
        self._prepared.run(gradients, ops.AdamWOptions(lrs, decays, *self._coefficients, scale, skip, zero_grads))


class Plans:
    """The calls of one step, and what has to be as it was for the next step to be like it.

    Args:
        groups: the optimizer's.
        plans: one for each call.
        tuners: of the values among the parameters.
        states: of the optimizer.
        places: where other parameters have to be.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        plans: list[StepPlan],
        tuners: list[Tuner],
        states: Mapping[Tensor, Any],
        places: list[Place],
    ) -> None:
        self.plans = plans
        self._backends = [ops.backend_for("masked_adamw_", plan.device) for plan in plans]
        self._states = states
        self._known_states = list(states.values())
        self._tuners = tuners
        self._places = [*places, *(place for tuner in tuners for place in tuner.check_places())]
        self._groups = groups
        self._params = [list(group["params"]) for group in groups]
        self._coefficients = [coefficients_of(group) for group in groups]
        moving = {id(p) for plan in plans for p in plan.parameters}
        self._idle = [p for params in self._params for p in params if id(p) not in moving]

    def fit(self, groups: list[dict[str, Any]]) -> bool:
        """Whether groups, coefficients and the parameters that have gradients are what they were."""
        if groups is not self._groups or len(groups) != len(self._params) or _dispatch_modes():
            return False
        for group, params, coefficients in zip(groups, self._params, self._coefficients, strict=True):
            now = group["params"]
            if len(now) != len(params) or not all(map(is_, now, params)) or coefficients_of(group) != coefficients:
                return False
        if len(self._states) != len(self._known_states) or not all(map(is_, self._states.values(), self._known_states)):
            return False
        if not all(tuner.attached for tuner in self._tuners):
            return False
        if [ops.backend_for("masked_adamw_", plan.device) for plan in self.plans] != self._backends:
            return False
        return all_there(self._places) and all(p.grad is None for p in self._idle)


def on_a_device(lr: float | Tensor) -> bool:
    """Whether a learning rate is a tensor that the host would have to wait for."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def coefficients_of(group: Mapping[str, Any]) -> Coefficients:
    """What parameters of one call have in common."""
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2), float(group["eps"]), bool(group["maximize"])
