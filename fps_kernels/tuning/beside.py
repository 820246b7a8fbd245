"""Chosen entries beside weights that nobody can write to: quantised ones, or whatever else multiplies as a linear map does.

Of a layer ``y = f(x)`` the tuned one is ``y = f(x) + x D^T``, where ``D`` has the chosen entries and begins as zeros: the
tuned model begins as the model was, bit for bit. The base is neither read nor written here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from fps_kernels import ops
from fps_kernels.ops.transfers import sent
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.tuning.places import Place, find_places
from fps_kernels.tuning.saved_input import NEARLY_ALL, Kept, computed_again, keep
from fps_kernels.tuning.tuner import Tuner
from fps_kernels.weights.buffers import BufferNotes
from fps_kernels.weights.fingerprint import fingerprint
from fps_kernels.weights.matrix import unfit
from fps_kernels.weights.offloading import execution_device
from fps_kernels.weights.sharding import check_whole
from fps_kernels.weights.survey import Survey


class AddedEntries(nn.Module):
    """A child of a linear layer, named ``<weight>_selected``: the chosen entries of what is added to the layer.

    It keeps itself out of ``state_dict``, whose names stay those of the base.

    Attributes:
        name: of the layer's weight.
        selection: the chosen entries, on the device of the layer.
        values: float32 ``[nnz]`` in CSR order, zeros at first.
        order: int32 ``[nnz]``: the entries column by column, by their numbers.
        distinct: int32: the columns that carry entries, ascending; ``None`` where nearly all do.
    """

    is_sharded = False
    order: Tensor
    distinct: Tensor | None

    def __init__(self, name: str, selection: WeightSelection, device: torch.device) -> None:
        super().__init__()
        self.name = name
        columns = selection.columns.long()
        self.order = columns.argsort(stable=True).int()
        found = columns.unique()
        self.distinct = None if found.numel() >= NEARLY_ALL * selection.layout.shape[1] else found.int()
        self.selection = selection
        self.values = nn.Parameter(torch.zeros(selection.nnz, dtype=torch.float32, device=device))
        self._mark()
        self._move(device)

    def _mark(self) -> None:
        """Let whoever has the parameter know what it is."""
        values: Any = self.values
        values.added_entries = self

    @property
    def here(self) -> WeightSelection:
        """All entries."""
        return self.selection

    @property
    def own(self) -> nn.Parameter:
        """The values."""
        return self.values

    def load(self, values: Tensor) -> None:
        """Take over values ``[nnz]``."""
        self.values.copy_(values)

    def _move(self, device: torch.device) -> None:
        self.selection = self.selection.to(device)
        self.order = sent(self.order, device)
        self.distinct = None if self.distinct is None else sent(self.distinct, device)

    def _apply(self, fn: Any, recurse: bool = True) -> "AddedEntries":
        # `.to(bfloat16)` leaves the values float32.
        super()._apply(lambda values: values.to(fn(values).device), recurse)  # type: ignore[no-untyped-call]  # torch's
        self._mark()
        self._move(self.values.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a tuner's ``state_dict`` and a delta hold the values."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        rows, columns = self.selection.layout.shape
        return f"{self.selection.nnz} of {rows * columns} entries added to {self.name}"

    def by_columns(self) -> tuple[Tensor, Tensor]:
        """The CSR of the entries of ``D.T``, in the order of :attr:`order`; made when a backward pass needs it."""
        lengths = torch.zeros(self.selection.layout.shape[1], dtype=torch.int32, device=self.order.device)
        lengths.index_add_(0, self.selection.columns, torch.ones_like(self.order))
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
        return offsets, self.selection.rows().int()[self.order]

    def among_distinct(self) -> Tensor:
        """The column of each entry, counted among the distinct ones."""
        assert self.distinct is not None
        places = torch.empty(self.selection.layout.shape[1], dtype=torch.int32, device=self.order.device)
        places[self.distinct] = torch.arange(self.distinct.numel(), dtype=torch.int32, device=self.order.device)
        return places[self.selection.columns]


class _Added(torch.autograd.Function):
    """``y + x D^T``, in the memory of ``y`` where that is the layer's own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, values: Tensor, entries: AddedEntries, kept: Kept, in_place: bool) -> Tensor:
        part = (x,) if kept is None else (kept,) if isinstance(kept, Tensor) else ()
        ctx.save_for_backward(values, *part)
        ctx.entries, ctx.kept, ctx.shape = entries, True if kept is None else kept if not part else False, x.shape
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        chosen = entries.selection
        rows = y.view(-1, y.shape[-1])
        ops.sparse_delta_matmul_(rows, x.reshape(-1, x.shape[-1]), chosen.row_offsets, chosen.columns, values)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        values, *part = ctx.saved_tensors
        e: AddedEntries = ctx.entries
        chosen = e.selection
        if part:
            x, whole = part[0], ctx.kept is True
        else:
            x, whole = computed_again(ctx.kept, e.distinct, len(ctx.shape) - 1, gy.dtype), e.distinct is None
        rows = gy.reshape(-1, gy.shape[-1])
        columns = chosen.columns if whole or e.distinct is None else e.among_distinct()
        gradient = ops.sampled_grad(rows, x.reshape(-1, x.shape[-1]), chosen.row_offsets, columns)
        gx = None
        if ctx.needs_input_grad[1]:
            gx = gy.new_zeros(ctx.shape)
            offsets, outputs = e.by_columns()
            ops.sparse_delta_matmul_(gx.view(-1, gx.shape[-1]), rows, offsets, outputs, values.detach(), e.order)
        return gy, gx, gradient, None, None, None


def _add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    entries = next(child for child in module.children() if isinstance(child, AddedEntries))
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    rows, columns = entries.selection.layout.shape
    if x is None or not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], rows) or x.shape[-1] != columns:
        raise RuntimeError(
            f"{entries.name} is tuned beside a layer that is no linear map of [..., {columns}] to [..., {rows}]: exclude it"
        )
    values = entries.values
    if torch.is_grad_enabled() and values.requires_grad:
        if (why := untrainable(module)) is not None:
            raise RuntimeError(f"{entries.name} cannot be trained: {why}")
        kept = keep(x, entries.distinct, x.dim() - 1)
    else:
        kept = None
    # Of a view, or what somebody else may hold, a copy is changed.
    in_place = not y._is_view() and y is not x and (y.grad_fn is not None or not y.requires_grad) and y.is_contiguous()
    return _Added.apply(y, x, values, entries, kept, in_place)


def untrainable(module: nn.Module) -> str | None:
    """Why no gradient passes a layer; ``None`` where it does, as far as is known."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has repacked its weight for inference on this CPU when it ran in evaluation mode, and such "
            "weights have no backward pass. Load the model again, and set module.support_avx512bf16_for_cpu = False on its "
            "Linear4bit layers before evaluating"
        )
    return None


class BesideTuner(Tuner):
    """A :class:`Tuner` whose values are added beside the weights, and written nowhere."""

    _entries: Mapping[str, AddedEntries]  # type: ignore[assignment]  # which have all of the interface that is used here

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._hooks: list[RemovableHandle] = []
        self._homes: list[Place] = []

    @property
    def attached(self) -> bool:
        """Whether the layers still add the values."""
        return bool(self._hooks)

    def _places(self) -> list[Place]:
        values: dict[str, Tensor] = {name: e.values for name, e in self._entries.items()}
        places, missing = find_places(self.model, {**values, **self.dense})
        if missing:
            raise ValueError(
                f"{missing[0]} was replaced since attach(), by itself or with its layer: what is tuned reaches nothing. "
                "Attach again, after whatever replaces layers"
            )
        return places

    def write_back(self) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError("values that are added beside weights are written nowhere: see fps.merge_into_dense()")

    def detach(self) -> None:
        """Leave the base alone, without the values: keep them in a delta before, or see :func:`merge_into_dense`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for siblings, key, _ in self._homes:
            siblings.pop(key, None)
        self._homes.clear()
        for p, flag in self._frozen.items():
            p.requires_grad_(flag)
        self._frozen.clear()


def attach_beside(model: nn.Module, selection: Selection | Mapping[str, Tensor]) -> BesideTuner:
    """:func:`fps_kernels.attach` with ``beside=True``."""
    selection = (selection if isinstance(selection, Selection) else Selection.from_masks(selection)).to("cpu")
    survey = Survey.of(model)
    check_whole(survey)
    layers = {name: _layer(survey, name, w) for name, w in selection.weights.items()}
    if not layers and not selection.dense:
        raise ValueError("the selection is empty: it names no parameter")
    for name in selection.dense:
        if name not in survey.parameters:
            raise ValueError(
                f"the selection trains {name} whole, and the model has no such parameter (any more, if its layer was "
                "quantised): choose with dense=... for those that it has"
            )
        if name in survey.offloaded:
            raise ValueError(
                f"{name} would be trained whole, and is brought in from elsewhere when its module runs: choose with "
                "dense=... without it (entries of its weight can be chosen), or give its module values of its own, as a new "
                "head has"
            )
        if reason := unfit(survey.parameters[name]):
            raise TypeError(f"{name} cannot be trained whole: {reason}")
    entries = {name: AddedEntries(name, w, _device(layers[name])) for name, w in selection.weights.items()}
    dense = {name: survey.parameters[name] for name in selection.dense}
    tuner = BesideTuner(model, entries, dense, selection.description, fingerprint(survey), BufferNotes(survey))
    trained = set(dense.values())
    for p in survey.first_names:
        if p.is_floating_point() and type(p) is nn.Parameter:
            tuner._frozen[p] = p.requires_grad
            p.requires_grad_(p in trained)
            p.grad = None if p not in trained else p.grad
    for name, layer in layers.items():
        child = f"{name.rpartition('.')[2]}_selected"
        layer.add_module(child, entries[name])
        tuner._homes.append((layer._modules, child, entries[name]))
        tuner._hooks.append(layer.register_forward_hook(_add, with_kwargs=True))
    tuner._hooks.append(model.register_forward_pre_hook(lambda *_: tuner.compare_under_ddp()))
    return tuner


def _layer(survey: Survey, name: str, chosen: WeightSelection) -> nn.Module:
    path, _, leaf = name.rpartition(".")
    module = survey.modules.get(path)
    if module is None:
        raise ValueError(f"the selection is of another model: this one has no {path or 'module'} for {name}")
    shape = linear_shape(module, leaf)
    if shape is None:
        raise ValueError(f"{name} belongs to a {type(module).__name__}, of which no one knows how it multiplies: exclude it")
    if not chosen.layout.is_plain or chosen.layout.parameter_shape != shape:
        raise ValueError(
            f"the selection is of another model: {name} multiplies as {list(shape)}, its entries are of "
            f"{list(chosen.layout.parameter_shape)}"
        )
    if any(isinstance(child, AddedEntries) for child in module.children()):
        raise ValueError(f"{name} is attached already: detach its tuner first")
    if (why := untrainable(module)) is not None:
        raise ValueError(f"{name} cannot be trained: {why}")
    return module


def linear_shape(module: nn.Module, leaf: str = "weight") -> tuple[int, int] | None:
    """``(outputs, inputs)`` of a linear layer of any kind; ``None`` of anything else."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(outputs, int) and isinstance(inputs, int):
        return outputs, inputs
    weight = getattr(module, leaf, None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _device(module: nn.Module) -> torch.device:
    """Where a layer computes."""
    if (where := execution_device(module)) is not None:
        return where
    held = (*module.parameters(), *module.buffers(), *vars(module).values())
    return next((t.device for t in held if isinstance(t, Tensor)), torch.device("cpu"))
