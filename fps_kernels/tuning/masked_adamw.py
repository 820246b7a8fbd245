"""AdamW on the chosen entries only: compact state, one kernel call a step, every other entry keeps its bits."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fps_kernels import ops
from fps_kernels.ops.transfers import sent, uploaded
from fps_kernels.selection import WeightSelection
from fps_kernels.tuning.agreement import note_written
from fps_kernels.tuning.compact_values import entries_of
from fps_kernels.tuning.optimizer_checks import check_options, check_parameter, check_state, checksums
from fps_kernels.tuning.places import remembered_places
from fps_kernels.tuning.sharded_state import chosen_of, own_state, whole_state
from fps_kernels.tuning.step_hooks import check_optimizer, tuners_of, warn_of_missing
from fps_kernels.tuning.step_plan import STATE, Coefficients, Member, Plans, StepPlan, coefficients_of, on_a_device
from fps_kernels.tuning.tuner import Tuner
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.shards import local_part


class MaskedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019, algorithm 2) on chosen entries; the others stay bit-identical.

    State is compact: float32 moments, and float32 master values where the weight is bfloat16 or float16, of the chosen
    entries only. On them it follows ``torch.optim.AdamW``. Parameters without a selection are tuned whole, by the same
    kernel. A step is one kernel launch on a GPU, safe under CUDA graph capture with ``capturable=True``.

    The chosen entries of a 16-bit weight follow their master values from the first step on: whoever writes such a weight
    later (``model.load_state_dict``) has to load the optimizer's state as well, or drop ``optimizer.state[weight]``.

    Args:
        params: a tuner from :func:`attach`, or groups of its parameters: update and write-back are one kernel then. Or
            groups from :func:`masked_parameters`. Plain parameters and groups without ``selections`` are tuned whole.
        lr: learning rate; a tensor on the parameters' device makes changes visible to a captured CUDA graph.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, of the chosen entries only.
        maximize: ascend instead of descend.
        capturable: the step may be captured in a CUDA graph, where an ``lr`` that is a number is captured as it is.
        zero_grads: set gradients to zero in the same pass that reads them, instead of calling ``zero_grad()``; for
            attached weights and parameters that are tuned whole.

    Raises:
        ValueError: a number out of range, a parameter given twice or without memory of its own, or a selection that
            does not fit its parameter.
        TypeError: parameters that are no plain tensors of float32, bfloat16 or float16.

    Example:
        >>> optimizer = fps.MaskedAdamW(fps.attach(model, selection), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    # torch.amp.GradScaler then hands over grad_scale and found_inf, which the kernel applies.
    _step_supports_amp_scaling = True
    # What the hooks of other optimizers' steps do is done in this one's step.
    checks_attached_weights = True

    def __init__(
        self,
        params: Tuner | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        zero_grads: bool = False,
    ) -> None:
        self._selections: dict[Tensor, WeightSelection] = {}
        self._views: dict[Tensor, tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]] = {}
        self._learning_rates: dict[torch.device, tuple[tuple[Any, ...], Tensor]] = {}
        self._plans: Plans | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        self._zero_grads = zero_grads
        super().__init__(params.param_groups() if isinstance(params, Tuner) else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as from :func:`masked_parameters`; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: as the constructor; nothing is added then.
            TypeError: as the constructor; nothing is added then.
        """
        group = dict(param_group)
        names = group.pop("names", None)
        selections = group.pop("selections", None)
        check_options({**self.defaults, **group})
        if isinstance(group["params"], set):
            raise TypeError("params must be in an order that stays the same: give a list instead of a set")
        items = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = items  # (name, parameter) pairs stay pairs: torch takes them apart
        params = [item[1] if isinstance(item, tuple) else item for item in items]
        unnamed = [item[0] if isinstance(item, tuple) else f"params[{i}]" for i, item in enumerate(items)]
        labels = unnamed if names is None else list(names)
        selections = [None] * len(params) if selections is None else list(selections)
        for argument, given in (("selections", selections), ("names", labels)):
            if len(given) != len(params):
                raise ValueError(f"{argument} must have one item per parameter, got {len(given)} for {len(params)}")
        placed: dict[Tensor, WeightSelection] = {}
        for label, p, selection in zip(labels, params, selections, strict=True):
            check_parameter(label, p if not isinstance(p, Tensor) else local_part(p))
            if p in placed:
                raise ValueError(f"{label} appears twice in its group")
            if not isinstance(selection, WeightSelection | None):
                raise TypeError(
                    f"the selection of {label} must be a WeightSelection or None, got {type(selection).__name__}"
                )
            entries = entries_of(p)
            if entries is not None:
                selection = entries.here
            elif selection is not None and self._zero_grads:
                raise ValueError(
                    f"zero_grads=True leaves the other gradients of {label} as they are: it needs weights that are attached "
                    "or tuned whole"
                )
            placed[p] = (
                WeightSelection.whole(MatrixLayout(tuple(local_part(p).shape)), p.device)
                if selection is None
                else selection.to(p.device)
            )
            if entries is not None:
                continue
            if placed[p].layout.parameter_shape != tuple(local_part(p).shape):
                expected = list(placed[p].layout.parameter_shape)
                raise ValueError(f"{label} has shape {list(p.shape)}, its selection is for {expected}")
        group["checksums"] = checksums([chosen_of(p, selection) for p, selection in placed.items()])
        super().add_param_group(group)
        self._selections.update(placed)
        self._plans = None

    def selections(self) -> dict[Tensor, WeightSelection]:
        """The chosen entries of every parameter of this optimizer; all of them where it is tuned whole."""
        return dict(self._selections)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the chosen entries of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            ValueError: a sparse gradient, or a parameter that was put into ``param_groups`` by hand; nothing is changed
                then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = self._plans
        if plans is not None and plans.fit(self.param_groups) and self._repeat(plans):
            return loss
        self._plans = None
        check_optimizer(self)
        places = remembered_places(p for group in self.param_groups for p in group["params"])
        calls: dict[tuple[torch.device, Coefficients], list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise ValueError("MaskedAdamW takes dense gradients, found a sparse one")
                    if p not in self._selections:
                        raise ValueError(f"a parameter of shape {list(p.shape)} is new: add it with add_param_group()")
                    calls.setdefault((p.device, coefficients_of(group)), []).append((p, group))
        made = []
        for (device, coefficients), found in calls.items():
            members = [self._member(p, group) for p, group in found]
            self._update(device, members, coefficients)
            if not is_simulated(found[0][0]) and ops.backend_for("masked_adamw_", device) != "reference":
                made.append(StepPlan(members, coefficients))
        warn_of_missing(self)
        if len(made) == len(calls) and all(plan.repeats for plan in made):
            self._plans = Plans(self.param_groups, made, tuners_of(self), self.state, places)
        return loss

    def _repeat(self, plans: Plans) -> bool:
        """A step like the last one; ``False`` where it cannot be, and nothing has happened."""
        with torch._C.DisableTorchFunctionSubclass():
            gradients = [found for plan in plans.plans if (found := plan.gradients()) is not None]
            if len(gradients) != len(plans.plans):
                return False
            for plan, found in zip(plans.plans, gradients, strict=True):
                lrs: Tensor | list[float] = [group["lr"] for group in plan.groups]
                if any(isinstance(lr, Tensor) for lr in lrs) or plan.groups[0]["capturable"]:
                    lrs = self._learning_rates_of(plan.device, plan.groups)
                plan.run(found, lrs, *self._scaling(plan.device), self._zero_grads)
                plan.note()
        return True

    def _update(self, device: torch.device, members: list[Member], coefficients: Coefficients) -> None:
        ops.masked_adamw_(
            [m.memory[0] for m in members],
            [m.gradient for m in members],
            [m.memory[1] for m in members],
            [m.memory[2] for m in members],
            [m.master for m in members],
            *([m.state[key] for m in members] for key in ("exp_avg", "exp_avg_sq", "step")),
            self._learning_rates_of(device, [m.group for m in members]),
            [float(m.group["weight_decay"]) for m in members],
            *coefficients,
            *self._scaling(device),
            self._zero_grads,
        )
        entries = [m.entries for m in members if m.entries is not None]
        for e in entries:
            e.agreed.copy_(e.seen.numbers)
        with torch._C.DisableTorchFunctionSubclass():
            written = [*(local_part(m.parameter) for m in members), *(e.seen.stored for e in entries)]
            note_written(written, [e.seen for e in entries])

    def _scaling(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What ``torch.amp.GradScaler`` hands over: ``(grad_scale, found_inf)``."""
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            None if scale is None else scale.to(device, torch.float32),
            None if skip is None else skip.to(device, torch.float32),
        )

    def _member(self, p: nn.Parameter, group: dict[str, Any]) -> Member:
        entries, state = entries_of(p), self._state_of(p)
        master = entries.seen.numbers if entries is not None else state.get("master", torch.empty(0, device=p.device))
        return Member(p, entries, group, state, self._gradient_of(p), self._view_of(p), master)

    def _state_of(self, p: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            selection = self._selections[p]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros(selection.nnz, dtype=torch.float32, device=p.device)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype != torch.float32 and "master" not in state:  # also where the model was float32 until now
            view, _, columns = self._view_of(p)
            state["master"] = view[self._selections[p].rows(), columns.long()].float()
        return state

    def _view_of(self, p: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """The memory that holds a parameter's values as a matrix, and the CSR of the chosen entries there."""
        entries = entries_of(p)
        held = local_part(p) if entries is None else entries.seen.stored
        origin = (held.untyped_storage()._cdata, held.storage_offset(), held.dtype, held.stride())
        found, views = self._views.get(p, (None, None))
        if views is None or found != origin:
            if entries is not None:
                views = entries.memory()
            else:
                selection = self._selections[p].to(p.device)
                if selection.layout.parameter_shape != tuple(held.shape):
                    expected = list(selection.layout.parameter_shape)
                    raise ValueError(
                        f"a parameter of shape {expected} has shape {list(held.shape)} now: make a new optimizer"
                    )
                view, columns = selection.in_memory(held)
                views = (view, selection.row_offsets, columns)
            self._views[p] = (origin, views)
        return views

    def _gradient_of(self, p: nn.Parameter) -> Tensor:
        """The gradient as a matrix whose columns are those of the parameter's view, or of the chosen entries only."""
        assert p.grad is not None
        grad, held = local_part(p.grad), local_part(p)
        if entries_of(p) is not None:
            return grad[: self._selections[p].nnz]
        if held.dim() > 2 and grad.stride() != held.stride():
            grad = torch.empty_like(held, dtype=grad.dtype).copy_(grad)  # one of the two is channels-last
        return self._selections[p].layout.memory(grad).view

    def _learning_rates_of(self, device: torch.device, groups: list[dict[str, Any]]) -> Tensor:
        if any(group["capturable"] or on_a_device(group["lr"]) for group in groups):
            rates: dict[int, Tensor] = {}
            for group in groups:
                if id(group) not in rates:
                    lr = group["lr"]
                    if on_a_device(lr):
                        rates[id(group)] = sent(lr.detach(), device, torch.float64).view(())
                    else:
                        rates[id(group)] = torch.full((), float(lr), dtype=torch.float64, device=device)
            return torch.stack([rates[id(group)] for group in groups])
        values = tuple(float(group["lr"]) for group in groups)
        cached = self._learning_rates.get(device)
        if cached is None or cached[0] != values:
            cached = self._learning_rates[device] = (values, uploaded(values, torch.float64, device))
        return cached[1]

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith("checksums:"))

    def state_dict(self) -> dict[str, Any]:
        """The state, as ``torch.optim.Optimizer.state_dict`` gives it.

        Where parameters are sharded it is that of all processes together, on each of them, which have to ask together: it
        can be loaded with any number of them.
        """
        saved: dict[str, Any] = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {**saved, "state": whole_state(saved["state"], parameters)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly; it must be of the same selection.

        Raises:
            ValueError: the state is of another selection or of other parameter groups, or lacks a part; nothing is loaded
                then.
        """
        current = [group["checksums"] for group in self.param_groups]
        saved = [group.get("checksums") for group in state_dict["param_groups"]]
        if None in saved:
            raise ValueError("the state is of another optimizer: it does not say which entries were chosen")
        if len(current) == len(saved) and current != saved:
            raise ValueError("the state is of another selection: its chosen entries are not those of this optimizer")
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(ids) == len(params):
            for i, p in zip(ids, params, strict=True):
                check_state(i, state_dict["state"].get(i), chosen_of(p, self._selections[p]).nnz)
            state_dict = {**state_dict, "state": own_state(state_dict["state"], ids, params)}
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of the parameter; moments and masters of 16-bit weights are float32.
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if key in STATE:
                    there = torch.as_tensor(value, device=p.device).detach()  # old optimizers counted steps in plain numbers
                    self.state[p][key] = there.to(p.device, torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_views", {})
        self.__dict__.setdefault("_learning_rates", {})
        self.__dict__.setdefault("_zero_grads", False)
        self.__dict__["_plans"] = None
        for group in self.param_groups:  # of a state from before there were these options
            for name, value in (("maximize", False), ("capturable", False)):
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_selections": self._selections}
