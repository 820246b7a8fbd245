"""PEFT: choices as SHiRA and Super-Tuning adapters, adapters as deltas, and FPS scores as a mask function for SHiRA.

Both adapters hold what is *added* to some entries of a frozen weight, of linear layers only. PEFT fixes how many entries a
layer has: SHiRA ``r * (inputs + outputs)`` (:class:`fps_kernels.LikeLoRA`), Super-Tuning one share of every layer.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.choosing.best_entries import best_entries
from fps_kernels.choosing.budgets import LikeLoRA, ScoredWeight
from fps_kernels.choosing.calibration import calibrate
from fps_kernels.choosing.scorers import FPS, ColumnScorer
from fps_kernels.choosing.statistics import ActivationStats
from fps_kernels.deltas.buffers import first_of, loss_of
from fps_kernels.deltas.delta import Delta
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.fingerprint import fingerprint
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.roles import classifier_modules

Folder = str | PathLike[str]
_PREFIX = "base_model.model."


def shira_mask(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    stats: ActivationStats | None = None,
    scorer: ColumnScorer | None = None,
    **calibration: Any,
) -> Callable[..., Tensor]:
    """A ``mask_fn`` for ``peft.ShiraConfig`` that chooses the entries with the best scores instead of random ones.

    The forward pass runs now, before PEFT wraps the model. Each layer gets exactly the ``r * (inputs + outputs)`` entries
    that PEFT expects of it.

    Args:
        model: the model that PEFT will wrap.
        data: calibration batches, as :func:`fps_kernels.calibrate` takes them.
        stats: statistics of an earlier pass, instead of ``data``.
        scorer: :class:`fps_kernels.FPS` by default.
        calibration: further arguments of :func:`fps_kernels.calibrate`, such as ``micro_batch``.

    Returns:
        ``mask_fn(base_layer, r)``: zeros and ones in the shape, dtype and device of the layer's weight.

    Raises:
        ValueError: neither or both of ``data`` and ``stats``; later, by the function: a layer that is not the model's or
            was never used, or an ``r`` that exceeds it.

    Example:
        >>> config = peft.ShiraConfig(r=4, target_modules=["qkv", "fc1"])
        >>> config.mask_fn = shira_mask(model, loader)
        >>> model = peft.get_peft_model(model, config)
    """
    scorer = FPS() if scorer is None else scorer
    if (data is None) == (stats is None):
        raise ValueError("give either data or stats" + (", not both" if data is not None else ""))
    if stats is None:
        assert data is not None
        stats = calibrate(model, data, ord=1 if scorer.ord is None else scorer.ord, **calibration)
    names = {id(p): name for name, p in model.named_parameters()}
    found = stats

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        name = names.get(id(weight))
        if name is None:
            raise ValueError(f"{base_layer} is no layer of the model that shira_mask() was made for")
        if name not in found:
            raise ValueError(f"{name} has no statistics: {found.unused.get(name, 'it was not seen')}")
        budget, layout = LikeLoRA(r), found[name].layout
        _check_holds(name, layout, r)
        factors = scorer.factors(found, name).to(weight.device, torch.float32)
        chosen = best_entries([[ScoredWeight(name, layout, weight.detach(), factors)]], budget)
        return chosen[name].mask().to(weight.dtype)

    return mask_fn


def _check_holds(name: str, layout: MatrixLayout, rank: int) -> None:
    """Refuse a weight that has fewer entries than SHiRA needs numbers for it."""
    wanted, entries = rank * sum(layout.shape), math.prod(layout.shape)
    if wanted > entries:
        raise ValueError(f"SHiRA of rank {rank} needs {wanted} entries of {name}, which has {entries}: choose a lower rank")


# ------------------------------------------------------------------------------------------------ writing


def write_shira(folder: Folder, source: Selection | Delta, model: nn.Module, rank: int | None = None) -> None:
    """Write a choice, or what was tuned, as a SHiRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go; it is made if it is missing.
        source: a selection: its entries, with nothing added to them yet. Or a delta: what it adds to the model's weights.
        model: the base model, unchanged and not wrapped.
        rank: SHiRA's ``r``; by default the smallest with ``r * (inputs + outputs)`` places for the entries of every layer.
            Places that are left over go to entries to which nothing is added; only further training would change them.
            Choose within ``LikeLoRA(rank)`` and there are none.

    Raises:
        ValueError: a source of another model; a delta that holds buffers, which SHiRA has no place for
            (``delta.buffers.clear()`` takes them out); entries of what is no linear layer, or parameters trained whole
            other than those of modules, likewise; a rank with fewer places than entries, or more than a weight has entries.
            Nothing is written then.

    Example:
        >>> selection = fps.select(model, loader, budget=fps.LikeLoRA(4), dense="head.*")
        >>> write_shira("adapter", selection, model)
        >>> peft.PeftModel.from_pretrained(model, "adapter", is_trainable=True)
    """
    added, whole = _sparse_and_whole(source, model)
    needed = max(math.ceil(w.nnz / sum(w.layout.shape)) for w, _ in added.values())
    rank = max(1, needed) if rank is None else rank
    tensors = {}
    for name, (w, values) in added.items():
        _check_holds(name, w.layout, rank)
        flat, values = _padded(name, w, values, LikeLoRA(rank).count(w.layout), f"rank={rank}")
        columns = w.layout.shape[1]
        tensors[f"{_PREFIX}{_module(name)}.shira_weight"] = values
        tensors[f"{_PREFIX}{_module(name)}.shira_indices"] = torch.stack([flat // columns, flat % columns]).int()
    modules = [_module(name) for name in added]
    _write(folder, peft.ShiraConfig(r=rank, target_modules=modules), tensors, whole, model)


def write_supertuning(folder: Folder, source: Selection | Delta, model: nn.Module, density: float | None = None) -> None:
    """Write a choice, or what was tuned, as a Super-Tuning adapter that ``peft.PeftModel.from_pretrained`` loads.

    As :func:`write_shira`, but each layer has ``int(density * entries)`` places.

    Args:
        folder: as there.
        source: as there.
        model: as there.
        density: 1 minus the ``sparsity`` of PEFT's configuration; by default the smallest that has places for the entries of
            every layer.

    Raises:
        ValueError: as there.

    Example:
        >>> write_supertuning("adapter", fps.load_delta("task.safetensors"), model)
        >>> peft.PeftModel.from_pretrained(model, "adapter").merge_and_unload()
    """
    added, whole = _sparse_and_whole(source, model)
    entries = {name: w.layout.shape[0] * w.layout.shape[1] for name, (w, _) in added.items()}
    # A little above what the fullest layer needs, since PEFT rounds 1 - (1 - density) down.
    needed = max((w.nnz + 0.25) / entries[name] for name, (w, _) in added.items())
    density = max(needed, 1.25 / min(entries.values())) if density is None else density
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}: Super-Tuning cannot hold every entry of a weight")
    config = peft.SupertuningConfig(sparsity=1 - density, target_modules=[_module(name) for name in added])
    tensors = {}
    for name, (w, values) in added.items():
        places = int(entries[name] * (1 - config.sparsity))
        flat, values = _padded(name, w, values, places, f"density={density}")
        tensors[f"{_PREFIX}{_module(name)}.supertuning_values"] = values
        tensors[f"{_PREFIX}{_module(name)}.supertuning_indices"] = flat.int()
    _write(folder, config, tensors, whole, model)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _sparse_and_whole(
    source: Selection | Delta, model: nn.Module
) -> tuple[dict[str, tuple[WeightSelection, Tensor]], dict[str, Tensor]]:
    """What is added to the chosen entries of each weight, float32 ``[nnz]``, and the parameters that are stored whole."""
    selection = source.selection if isinstance(source, Delta) else source
    if isinstance(source, Delta):
        source.check_written()
        if source.buffers:
            raise ValueError(
                f"the delta holds buffers that training changed ({first_of(source.buffers)}), and PEFT's adapters have no "
                "place for them: delta.buffers.clear() takes them out, but the adapter then predicts something else"
            )
        if source.buffers_left_out:
            lost = loss_of(source.buffers_left_out)
            warnings.warn(f"{lost}, nor does the adapter: it predicts something else than what was tuned", stacklevel=3)
    if isinstance(source, Delta) and fingerprint(model) != source.base:
        raise ValueError("the delta is of another base model, or this one was changed since: the fingerprints differ")
    parameters = selection.check(model)
    if not selection.weights:
        raise ValueError("the selection names no weight to write")
    for name, w in selection.weights.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear) or not name.endswith(".weight") or w.layout.row_dims != (0,):
            raise ValueError(
                f"{name} belongs to a {type(owner).__name__}, and PEFT's adapters hold entries of linear layers only: leave "
                f"it out with exclude={name!r}"
            )
    whole = {n: source.dense[n] if isinstance(source, Delta) else parameters[n].detach() for n in selection.dense}
    added = {}
    for name, w in selection.weights.items():
        w = w.to("cpu")
        if isinstance(source, Delta):
            base = w.layout.matrix(parameters[name]).cpu()[w.rows(), w.columns.long()]
            added[name] = (w, source.values[name].float() - base.float())
        else:
            added[name] = (w, torch.zeros(w.nnz, device="cpu"))
    return added, whole


def _padded(name: str, w: WeightSelection, values: Tensor, places: int, setting: str) -> tuple[Tensor, Tensor]:
    """Positions and values of a layer's entries, filled up to ``places`` with entries to which nothing is added."""
    if w.nnz > places:
        raise ValueError(f"{setting} has places for {places} entries of {name}, which has {w.nnz}")
    flat, spare = w.flat(), places - w.nnz
    if spare:
        # Among the first `places` entries at least `spare` are free.
        first = torch.arange(places, device="cpu")
        free = first[~torch.isin(first, flat)][:spare]
        flat, values = torch.cat([flat, free]), torch.cat([values, torch.zeros(spare, device="cpu")])
    return flat, values


def _write(folder: Folder, config: Any, tensors: dict[str, Tensor], whole: dict[str, Tensor], model: nn.Module) -> None:
    saved: dict[str, None] = {}
    for name in whole:
        module = name.rpartition(".")[0]
        missing = [f"{module}.{leaf}" for leaf, _ in model.get_submodule(module).named_parameters(recurse=False)]
        if not module or any(other not in whole for other in missing):
            raise ValueError(
                f"{name} was trained whole and its module was not: PEFT's adapters save whole modules only; select with "
                f"dense={[f'{head}.*' for head in classifier_modules(model)]}"
            )
        saved[module] = None
        tensors[f"{_PREFIX}{name}"] = whole[name].cpu().contiguous()
    config.modules_to_save = list(saved) or None
    config.inference_mode = True
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------------------------ reading


def read_adapter(folder: Folder, model: nn.Module) -> Delta:
    """Read a SHiRA or Super-Tuning adapter that PEFT, or this module, wrote, as a delta to its base model.

    ``.selection`` of the result is the choice; ``.apply_(model)`` does what merging the adapter does.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base model, unchanged and not wrapped.

    Raises:
        ValueError: another kind of adapter, one with a low-rank part, or one that does not fit the model.
        OSError: it cannot be read.

    Example:
        >>> read_adapter("adapter", model).apply_(model)
    """
    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text())
    kind = config.get("peft_type")
    if kind not in ("SHIRA", "SUPERTUNING"):
        raise ValueError(f"{path} holds a {kind} adapter: only SHIRA and SUPERTUNING choose entries of weights")
    if kind == "SUPERTUNING" and config.get("r") is not None:
        raise ValueError(
            f"{path} has a low-rank part (r={config['r']}) beside its chosen entries, which a delta cannot hold"
        )
    tensors = load_file(path / "adapter_model.safetensors")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values_key, indices_key = (
        ("shira_weight", "shira_indices")
        if kind == "SHIRA"
        else (
            "supertuning_values",
            "supertuning_indices",
        )
    )
    weights, values, dense = {}, {}, {}
    for key, tensor in tensors.items():
        name, _, leaf = key.removeprefix(_PREFIX).rpartition(".")
        if leaf == values_key:
            indices = _indices(tensors, f"{_PREFIX}{name}.{indices_key}", path)
            weights[f"{name}.weight"], values[f"{name}.weight"] = _entries(f"{name}.weight", parameters, indices, tensor)
        elif leaf != indices_key:
            full = f"{name}.{leaf}"
            if full not in parameters or parameters[full].shape != tensor.shape:
                raise ValueError(f"the adapter is of another model: this one has no {full} of shape {list(tensor.shape)}")
            dense[full] = tensor
    selection = Selection(weights, tuple(dense), description={"scorer": f"PEFT {kind} adapter"})
    return Delta(selection, values, dense, fingerprint(model))


def _indices(tensors: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{path} lacks {key}: Super-Tuning must be saved with save_precomputed_indices=True")
    return tensors[key].long()


def _entries(name: str, parameters: Mapping[str, Tensor], indices: Tensor, added: Tensor) -> tuple[WeightSelection, Tensor]:
    weight = parameters.get(name)
    if weight is None or weight.dim() != 2 or weight.dtype not in ops.FLOAT_DTYPES:
        raise ValueError(f"the adapter is of another model: this one has no matrix {name}")
    layout = MatrixLayout(tuple(weight.shape))
    O, C = layout.shape
    flat = indices[0] * C + indices[1] if indices.dim() == 2 else indices
    within = bool((indices[-1] < C).all()) if indices.dim() == 2 else True
    if flat.numel() != added.numel() or (flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= O * C or not within)):
        raise ValueError(f"the adapter is of another model: its entries do not fit {name} of shape {[O, C]}")
    flat, order = flat.sort()
    if bool((flat.diff() == 0).any()):
        raise ValueError(f"the adapter is damaged: it names an entry of {name} twice")
    w = WeightSelection.from_flat(layout, flat)
    base = layout.matrix(weight).cpu()[w.rows(), w.columns.long()]
    return w, base.float() + added[order].float()
