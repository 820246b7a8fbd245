"""What each way of choosing and tuning would need, and the largest batch that fits: nothing is allocated, no GPU needed."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fps_kernels.choosing.feeding import Forward
from fps_kernels.memory.extrapolation import Theatre, largest_batch
from fps_kernels.memory.measuring import format_bytes, simulated
from fps_kernels.memory.methods import ASKED_FOR, MEANINGS, METHODS
from fps_kernels.memory.rehearsal import Occasion, Parts, lora_layers
from fps_kernels.selection.html import html_table


@dataclass(frozen=True)
class MethodCost:
    """What one method needs, in bytes. Each part is at its largest, not all at one time: their sum may exceed the peak.

    Attributes:
        method: one of :data:`~fps_kernels.memory.methods.METHODS`.
        batch_size: images a step.
        peak: most bytes of live tensors at any time of a step that has the optimizer's state.
        weights: parameters and buffers, those that the method adds included.
        activations: what the forward pass keeps for the backward pass; of a forward pass alone, its most.
        gradients: of the parameters, at the end of the backward pass.
        optimizer: its state.
        largest_batch: the largest batch that fits the memory asked about, 0 if none fits; ``None`` if none was asked about,
            and for FPS, which goes through a batch of any size one sample at a time.
    """

    method: str
    batch_size: int
    peak: int
    weights: int
    activations: int
    gradients: int
    optimizer: int
    largest_batch: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`plan` found.

    Attributes:
        model: its name.
        dtype: of weights and activations.
        costs: one per method.
        memory: bytes that the largest batches were sought for, or ``None``.
    """

    model: str
    dtype: torch.dtype
    costs: tuple[MethodCost, ...]
    memory: int | None

    def __getitem__(self, method: str) -> MethodCost:
        for cost in self.costs:
            if cost.method == method:
                return cost
        raise KeyError(method)

    def _ipython_key_completions_(self) -> list[str]:
        return [cost.method for cost in self.costs]

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        names = ["method", "peak", "weights", "activations", "gradients", "optimizer"]
        rows = [
            [c.method, *(format_bytes(getattr(c, name)) for name in names[1:])]
            + (["any" if c.largest_batch is None else str(c.largest_batch)] if self.memory is not None else [])
            for c in self.costs
        ]
        head = names + ([f"largest batch in {format_bytes(self.memory)}"] if self.memory is not None else [])
        return f"{self.model}, batch {self.costs[0].batch_size}, {str(self.dtype).removeprefix('torch.')}", head, rows

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html_table(*self._table(), notes=(f"{c.method}: {MEANINGS[c.method]}" for c in self.costs))

    def __str__(self) -> str:
        title, head, rows = self._table()
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *rows)]
        return "\n".join([title, *lines])


def plan(
    model: str | Callable[[], nn.Module],
    batch_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    methods: Sequence[str] | None = None,
    k: int = 4,
    input_size: Sequence[int] | None = None,
    forward: Forward | None = None,
) -> MemoryPlan:
    """What each way of choosing and tuning would need, without allocating it.

    One step of every method is taken on tensors that have shapes and no memory. Of a model with many equal blocks, one after
    the other, it is taken with two and with three of them: each block more takes the same. For ``attach`` every column of
    an input counts as needed, since which are chosen is not known: an upper bound, by the inputs of the attention's
    projections.

    Args:
        model: the name of a timm model, or a function that makes the model.
        batch_size: images a step.
        dtype: of weights and activations: ``torch.float32`` or ``torch.bfloat16``.
        memory: bytes of a card; the largest batch that fits it is sought for each method.
        methods: of ``fps_kernels.memory.methods.METHODS``; by default all but ``full-8bit`` and ``LoRA-8bit``, and LoRA
            where there are layers for it.
        k: entries per output neuron, for ``attach``.
        input_size: of one sample, such as ``(3, 224, 224)``; a timm model knows its own.
        forward: ``forward(model, batch)`` gives the logits; by default ``model(batch)``.

    Returns:
        :class:`MemoryPlan`, which prints as a table.

    Raises:
        ValueError: a number out of range, an unknown method or model, or an input size that is not known.
        ImportError: a model name without timm.

    Example:
        >>> print(fps.memory.plan("vit_huge_patch14_224", 8, memory=24 * 2**30))
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for method in methods or ():
        if method not in METHODS:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {method!r}")
    create, size, name = _model(model, input_size)
    occasion = Occasion(size, dtype, k, forward)
    with simulated():
        theatre = Theatre(create, occasion)
        costs = []
        chosen = methods or [m for m in METHODS if m not in ASKED_FOR and (m != "LoRA" or lora_layers(theatre.whole))]
        for method in chosen:
            parts = theatre.of(method)
            found = parts(batch_size)
            largest = None
            if memory is not None and (method != "FPS" or found.peak > memory):
                largest = largest_batch(parts, batch_size, memory)
            costs.append(_cost(method, batch_size, found, largest))
    return MemoryPlan(name, dtype, tuple(costs), memory)


def _cost(method: str, batch_size: int, parts: Parts, largest: int | None) -> MethodCost:
    return MethodCost(
        method, batch_size, parts.peak, parts.weights, parts.activations, parts.gradients, parts.optimizer, largest
    )


def _model(
    model: str | Callable[[], nn.Module], input_size: Sequence[int] | None
) -> tuple[Callable[[], nn.Module], tuple[int, ...], str]:
    if not isinstance(model, str):
        if input_size is None:
            raise ValueError("input_size is needed with a function that makes the model, such as (3, 224, 224)")
        return model, tuple(input_size), getattr(model, "__name__", "model")
    import timm

    check_name(model)
    if input_size is None:
        input_size = timm.get_pretrained_cfg_value(model, "input_size")
    if input_size is None:
        raise ValueError(f"input_size is needed, such as (3, 224, 224): timm does not say what {model} takes")
    return partial(timm.create_model, model), tuple(input_size), model


def check_name(name: str) -> None:
    """Refuse a name that timm has no model of.

    Raises:
        ValueError: it has none of that name; the message names the one that is most alike.
        ImportError: timm is missing.
    """
    import timm

    if timm.is_model(name):
        return
    # Names are long: what was mistyped is held against as much of each.
    likeness = {other: difflib.SequenceMatcher(None, other[: len(name)], name).ratio() for other in timm.list_models()}
    nearest = max(likeness, key=lambda other: (likeness[other], -len(other)))
    hint = f"did you mean {nearest!r}?" if likeness[nearest] > 0.7 else "timm.list_models() names them all"
    raise ValueError(f"timm has no model {name!r}: {hint}")
