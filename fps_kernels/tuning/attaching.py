"""``attach``: the chosen entries become the only trainable ones, and no dense gradient exists."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fps_kernels.choosing.feeding import scripted_parameters
from fps_kernels.selection import Selection
from fps_kernels.tuning.compact_values import SelectedEntries, entries_of
from fps_kernels.tuning.tuned_weight import TunedWeight, become_plain, become_tuned
from fps_kernels.weights.fingerprint import fingerprint
from fps_kernels.weights.matrix import is_simulated, unfit


class Tuner:
    """A model of which only chosen entries are trained; made by :func:`attach`, a context manager that detaches at its end.

    Attributes:
        model: the model.
        compact: the values of the chosen entries, float32 ``[nnz]`` parameters in CSR order, by the names of their weights.
        dense: the parameters that are trained whole, by name.
        base: fingerprint of the model as it was attached.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: dict[str, SelectedEntries],
        dense: dict[str, nn.Parameter],
        description: dict[str, str],
        base: str,
    ) -> None:
        self.model = model
        self._entries = entries
        self.dense = dense
        self.base = base
        self._description = description
        self._frozen: dict[nn.Parameter, bool] = {}
        self._loading: RemovableHandle | None = None

    @property
    def compact(self) -> dict[str, nn.Parameter]:
        """The values of the chosen entries, float32 ``[nnz]`` in CSR order, by the names of their weights."""
        return {name: e.values for name, e in self._entries.items()}

    @property
    def selection(self) -> Selection:
        """What was attached."""
        weights = {name: e.selection for name, e in self._entries.items()}
        return Selection(weights, tuple(self.dense), description=dict(self._description))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter: the compact ones by the names of their weights, then the dense ones."""
        yield from self.compact.items()
        yield from self.dense.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, for any optimizer of ``torch.optim``.

        Example:
            >>> optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        """
        for _, p in self.named_parameters():
            yield p

    def param_groups(self, options: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer.

        Args:
            options: ``options(name, parameter)`` gives the group options of a parameter, such as
                ``{"lr": 1e-4, "weight_decay": 0.0}``; parameters with equal options share a group.

        Example:
            >>> groups = tuner.param_groups(lambda name, p: {"weight_decay": 0.0 if name in tuner.dense else 0.05})
            >>> optimizer = fps.MaskedAdamW(groups, lr=1e-3)
        """
        groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        for name, p in self.named_parameters():
            chosen = dict(options(name, p)) if options is not None else {}
            members = next((members for known, members in groups if known == chosen), None)
            if members is None:
                groups.append((chosen, members := []))
            members.append(p)
        return [{"params": members, **chosen} for chosen, members in groups]

    def write_back(self) -> None:
        """Write the compact values into the weights. Optimizers that are a ``torch.optim.Optimizer`` do so by themselves.

        So does the next forward pass outside a compiled graph, and ``model.state_dict()``; call this after changing
        ``compact`` values by hand in front of anything else.
        """
        for e in self._entries.values():
            e.write_back()

    def state_dict(self) -> dict[str, Tensor]:
        """The compact values, float32, by the names of their weights.

        ``model.state_dict()`` holds the tuned model. Where weights are bfloat16 or float16 these values are more precise, so
        that a resumed run goes on with the same bits only if they are saved and loaded too.
        """
        return {name: p.detach() for name, p in self.compact.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load compact values and write them into the weights.

        Raises:
            ValueError: names or shapes that are not this tuner's; nothing is loaded then.
        """
        compact = self.compact
        if missing := sorted(compact.keys() ^ state.keys()):
            raise ValueError(f"the state is of another tuner: {missing[0]} is in one of the two only")
        for name, p in compact.items():
            if state[name].shape != p.shape:
                raise ValueError(
                    f"the state is of another selection: {name} has {list(state[name].shape)} values, not {list(p.shape)}"
                )
        for name, p in compact.items():
            p.copy_(state[name])
        self.write_back()

    def detach(self) -> None:
        """Leave a plain model with the tuned weights; parameters require gradients as before :func:`attach`.

        An optimizer that was made for this tuner refuses to step from now on. A second call does nothing.
        """
        try:
            for e in self._entries.values():
                if e.attached:
                    e.synchronise()
        finally:
            for e in self._entries.values():
                if e.attached:
                    become_plain(e.release())  # type: ignore[arg-type]
            for p, flag in self._frozen.items():
                p.requires_grad_(flag)
            self._frozen.clear()
            if self._loading is not None:
                self._loading.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        chosen = sum(e.selection.nnz for e in self._entries.values())
        whole = sum(p.numel() for p in self.dense.values())
        return f"Tuner({chosen} entries of {len(self._entries)} weights, {whole} in {len(self.dense)} dense parameters)"


def attach(model: nn.Module, selection: Selection | Mapping[str, Tensor]) -> Tuner:
    """Make the chosen entries, and the parameters that a selection trains whole, the only trainable ones.

    The weights stay where they are and keep their names, and the model's own code does not change. Behind each
    multiplication by a selected weight autograd gets one more node, which computes the gradients of the chosen entries
    only, from the columns of the input that they need. After every step of an optimizer the weight holds the tuned
    values, so that inference costs nothing and ``model.state_dict()`` is the tuned model, under the same keys.

    The chosen values are parameters of children named ``<weight>_selected`` of the modules that own the weights. They are
    one-dimensional: whoever spares one-dimensional parameters from weight decay spares them too.

    Args:
        model: the model, not yet wrapped for distributed training.
        selection: a :class:`Selection` of this model, or boolean masks in the shapes of their parameters, by name.

    Returns:
        :class:`Tuner`.

    Raises:
        ValueError: a selection of another model, an empty one, a weight that is attached already, that has no values,
            whose strides allow no matrix, or that is named twice; a model that is wrapped for distributed training. The
            model is unchanged then.
        TypeError: a weight that is no plain parameter of float32, bfloat16 or float16 (a parametrization, a
            quantised or distributed tensor, one inside a scripted module). The model is unchanged then.

    Example:
        >>> tuner = fps.attach(model, selection)
        >>> optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()
        >>> tuner.detach()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("attach the model before it is wrapped in DistributedDataParallel: it would not reduce the values")
    if not isinstance(selection, Selection):
        selection = Selection.from_masks(selection)
    parameters = selection.check(model)
    if not parameters:
        raise ValueError("the selection is empty: it names no parameter")
    _check(model, selection, parameters)
    _install_hooks()
    made = {
        name: SelectedEntries(name, model.get_submodule(name.rpartition(".")[0]), parameters[name], chosen)
        for name, chosen in selection.weights.items()
    }
    dense = {name: parameters[name] for name in selection.dense}
    tuner = Tuner(model, made, dense, selection.description, fingerprint(model))
    trained = set(tuner.dense.values())
    for p in model.parameters():
        tuner._frozen[p] = p.requires_grad
        p.requires_grad_(p in trained)
        if p not in trained:
            p.grad = None  # of no use any more, and as large as the parameter
    for name, entries in made.items():
        become_tuned(entries.weight).entries = entries
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).add_module(f"{leaf}_selected", entries)
    tuner._loading = model.register_load_state_dict_pre_hook(_refuse_assignment)
    return tuner


def _refuse_assignment(model: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise RuntimeError(
            "load_state_dict(assign=True) would replace attached weights: load without assign, or detach first"
        )


def _check(model: nn.Module, selection: Selection, parameters: Mapping[str, nn.Parameter]) -> None:
    scripted = scripted_parameters(model)
    attached = [m.name for m in model.modules() if isinstance(m, SelectedEntries)]
    if attached:  # a second tuner would freeze the values of the first
        name = next((name for name in attached if name in parameters), attached[0])
        raise ValueError(f"{name} is attached already: detach its tuner first")
    names: dict[nn.Parameter, str] = {}
    for name, p in parameters.items():
        if (first := names.setdefault(p, name)) != name:
            raise ValueError(f"{first} and {name} are one parameter: name it once")
        if name in scripted:
            raise TypeError(f"{name} belongs to a scripted module, whose multiplications cannot be intercepted")
        if reason := unfit(p):
            raise TypeError(f"{name} cannot be tuned: {reason}")
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values: load the model first")
    for name, chosen in selection.weights.items():
        p, (owner_name, _, leaf) = parameters[name], name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(owner, ParametrizationList):
            raise TypeError(f"{name} belongs to a parametrization, which computes the weight: remove it first")
        if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise TypeError(
                f"{name} belongs to {owner_name or 'the model'} itself, a {type(owner).__name__}, which would run the child "
                "module that holds selected values: give the weight a module of its own"
            )
        if type(p) is not nn.Parameter and not is_simulated(p):
            raise TypeError(f"{name} cannot be tuned: it is a {type(p).__name__}, not a plain torch.nn.Parameter")
        if p.dim() not in (2, 4):
            raise ValueError(
                f"{name} has shape {list(p.shape)}: only weights of linear maps and 2-D convolutions are attached"
            )
        if hasattr(owner, f"{leaf}_selected"):
            raise ValueError(f"{name} cannot be attached: {owner_name or 'the model'} has a {leaf}_selected of its own")
        try:
            chosen.layout.writable_matrix(p)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


# ------------------------------------------------------------------------------------------------ optimizers

_hooked = False


def _install_hooks() -> None:
    """Once in a process: every optimizer that steps compact values writes them into their weights afterwards."""
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
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
    if getattr(optimizer, "writes_attached_weights", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            entries = entries_of(p)
            if entries is not None:
                entries.write_back()  # whether or not they look changed: torch's fused optimizers leave no trace
