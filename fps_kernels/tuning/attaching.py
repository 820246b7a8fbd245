"""``attach``: the chosen entries become the only trainable ones, and no dense gradient exists."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from fps_kernels.keeping.kept import Keeping
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.tuning.agreement import Scope, scope_of
from fps_kernels.tuning.beside import attach_beside
from fps_kernels.tuning.compact_values import SelectedEntries
from fps_kernels.tuning.groups import chosen_parameters
from fps_kernels.tuning.sharded_entries import GradientExchange, ShardedEntries, divided
from fps_kernels.tuning.step_hooks import install_hooks
from fps_kernels.tuning.tuned_weight import hold, shorten
from fps_kernels.tuning.tuner import Tuner
from fps_kernels.weights.buffers import BufferNotes
from fps_kernels.weights.fingerprint import fingerprint
from fps_kernels.weights.kinds import DIMENSIONS
from fps_kernels.weights.matrix import is_simulated, unfit
from fps_kernels.weights.sharding import check_sharding
from fps_kernels.weights.survey import Survey


def attach(
    model: nn.Module,
    selection: Selection | Mapping[str, Tensor],
    *,
    keep_bits: int | None = None,
    beside: bool = False,
) -> Tuner:
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
        keep_bits: 8 keeps in so many bits what every forward pass of the model keeps for its backward pass, as
            :func:`fps_kernels.kept` does; ``None`` as torch does.
        beside: weights that nobody can write to, as quantised ones: the chosen entries are added beside each layer, and
            begin as zeros. The selection names ``<layer>.weight`` and is of the weights as they were before; the tuned
            model is this one with the tuner, or what :func:`fps_kernels.merge_into_dense` makes of both.

    Returns:
        :class:`Tuner`.

    Raises:
        ValueError: ``keep_bits`` is neither 8 nor ``None``; a selection of another model, an empty one, a weight that is
            attached already, that has no values, whose strides allow no matrix, or that is named twice; a model that is
            wrapped for distributed training, or sharded. The model is unchanged then.
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
    if isinstance(model, nn.DataParallel):
        raise ValueError("a DataParallel model cannot be attached: use DistributedDataParallel, around the attached model")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attach() cannot run under torch.inference_mode(): its values could never be trained; leave it first"
        )
    if beside:
        if keep_bits is not None:
            raise ValueError("keep_bits does not go with beside: run the loop inside of fps.kept()")
        return attach_beside(model, selection)
    keeping = None if keep_bits is None else _keeping(keep_bits)
    survey = Survey.of(model)
    check_sharding(survey)
    selection, parameters = chosen_parameters(survey, selection)
    selection = selection.to("cpu")  # where columns are numbered and rows are looked up
    _check(survey, selection, parameters)
    install_hooks()
    multiplied = survey.multiplied if survey.sharded else parameters
    made = {name: _entries(survey, name, multiplied[name], chosen) for name, chosen in selection.weights.items()}
    dense = {name: parameters[name] for name in selection.dense}
    tuner = Tuner(model, made, dense, selection.description, fingerprint(survey), BufferNotes(survey))
    sharded = divided(made.values())
    if sharded:
        tuner.compare_across_processes(sharded[0].shard.group)
    trained = {p for name in tuner.dense for p in (parameters[name], multiplied[name])}
    for p in [*survey.first_names, *(multiplied[name] for name in survey.sharded)]:
        tuner._frozen[p] = p.requires_grad
        p.requires_grad_(p in trained)
        if p not in trained:
            p.grad = None  # of no use any more, and as large as the parameter
    for name, entries in made.items():
        hold(entries)
        host, child = _home(survey, name)
        entries.live_in(host, child)
        shorten(host)
    if sharded:
        tuner._exchange = GradientExchange(model, sharded)
        tuner._twins = {parameters[name]: multiplied[name] for name in parameters}
    tuner._scope = Scope(model, list(made.values()), keeping)
    tuner._scope.tuner = tuner
    tuner._loading = model.register_load_state_dict_pre_hook(_refuse_assignment)
    return tuner


def _entries(survey: Survey, name: str, weight: nn.Parameter, chosen: WeightSelection) -> SelectedEntries:
    owner, shard = survey.owner(name)[0], survey.sharded.get(name)
    if shard is None:
        return SelectedEntries(name, owner, weight, chosen, hold)
    return ShardedEntries(name, owner, weight, chosen, hold, shard)


def _home(survey: Survey, name: str) -> tuple[nn.Module, str]:
    """The module whose child the selected values of a weight become, and the child's name."""
    owner, leaf = survey.owner(name)
    if isinstance(owner, ParametrizationList):  # which would run what it holds
        path, _, tensor = name.rpartition(".")[0].rpartition(".")
        return survey.modules[path.rpartition(".")[0]], f"{tensor}_{leaf}_selected"
    return owner, f"{leaf}_selected"


def _keeping(keep_bits: int) -> Keeping:
    if keep_bits != 8:
        raise ValueError(f"keep_bits must be 8 or None, got {keep_bits!r}: fewer bits cost accuracy")
    return Keeping(keep_bits)


def _is_weight_norm(owner: ParametrizationList, leaf: str) -> bool:
    """Whether a parametrization is torch's weight norm, and the parameter what it normalises."""
    return len(owner) == 1 and type(owner[0]).__name__ == "_WeightNorm" and leaf == "original1"


def tuner_of(model: nn.Module) -> Tuner:
    """The tuner of an attached model: :func:`attach` gave it back, but a copy of an attached model has one of its own.

    Args:
        model: the model, or one that it is a part of.

    Raises:
        ValueError: nothing in it is attached, or more than one part of it is.

    Example:
        >>> best = copy.deepcopy(model)  # while training goes on
        >>> fps.save_delta(fps.tuner_of(best), "best.safetensors")
    """
    tuners = [scope.tuner for m in model.modules() if (scope := scope_of(m)) is not None and scope.tuner is not None]
    if len(tuners) != 1:
        found = f"{len(tuners)} of its parts are: ask for the tuner of one of them" if tuners else "attach it first"
        raise ValueError(f"tuner_of(model) takes an attached model, got a {type(model).__name__}: {found}")
    tuner: Tuner = tuners[0]
    return tuner


def _refuse_assignment(model: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise RuntimeError(
            "load_state_dict(assign=True) would replace attached weights: load without assign, or detach first"
        )


def _check(survey: Survey, selection: Selection, parameters: Mapping[str, nn.Parameter]) -> None:
    attached = [m.name for m in survey.modules.values() if isinstance(m, SelectedEntries)]
    if attached:  # a second tuner would freeze the values of the first
        name = next((name for name in attached if name in parameters), attached[0])
        raise ValueError(f"{name} is attached already: detach its tuner first")
    for name, p in parameters.items():
        if name in survey.scripted:
            raise TypeError(f"{name} belongs to a scripted module, whose multiplications cannot be intercepted")
        shard = survey.sharded.get(name)
        if shard is None and survey.sharded:
            raise ValueError(
                f"{name} is not sharded, while other parameters are: no one would add up its gradients. Let fully_shard "
                "have it, or exclude it from the selection"
            )
        if reason := unfit(p if shard is None else shard.local):
            raise TypeError(f"{name} cannot be tuned: {reason}")
        if p.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode() and cannot be changed outside of it: make the model outside"
            )
        if p.is_meta:
            cure = "tune beside it, attach(..., beside=True)" if name in survey.offloaded else "load the model first"
            raise ValueError(f"{name} is on the meta device and has no values: {cure}")
    for name, chosen in selection.weights.items():
        p, (owner, leaf) = parameters[name], survey.owner(name)
        path = name.rpartition(".")[0] or "the model"
        if isinstance(owner, ParametrizationList) and not _is_weight_norm(owner, leaf):
            raise TypeError(f"{name} belongs to a parametrization, which computes the weight: remove it first")
        if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not isinstance(owner, ParametrizationList):
            raise TypeError(
                f"{name} belongs to {path} itself, a {type(owner).__name__}, which would run the child "
                "module that holds selected values: give the weight a module of its own"
            )
        shard = survey.sharded.get(name)
        if type(p) is not nn.Parameter and not is_simulated(p) and shard is None:
            raise TypeError(f"{name} cannot be tuned: it is a {type(p).__name__}, not a plain torch.nn.Parameter")
        if p.dim() not in DIMENSIONS:
            raise ValueError(f"{name} has shape {list(p.shape)}: only weights of linear maps and convolutions are attached")
        host, child = _home(survey, name)
        if hasattr(host, child):
            raise ValueError(f"{name} cannot be attached: {path} has a {child} of its own")
        try:
            if shard is None:
                chosen.layout.memory(p)
            else:
                shard.piece(chosen.layout).layout.memory(shard.local)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
