"""Feeding calibration data through a model without gradients, watching every weight, and leaving no trace behind."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fps_kernels.choosing.in_step import in_step
from fps_kernels.weights.hidden_functions import listening
from fps_kernels.weights.matrix import unfit
from fps_kernels.weights.offloading import Presence
from fps_kernels.weights.survey import Survey
from fps_kernels.weights.uses import Uses, WeightUse
from fps_kernels.weights.watched_weight import Taker
from fps_kernels.weights.watching import WeightInterception

Forward = Callable[[nn.Module, Any], Any]
T = TypeVar("T")

AT_ONCE = 32
"""Batches that go through an offloaded model together, if nobody says how many."""


class UnsupportedInputError(TypeError):
    """The input of a weight has a dtype that has no column norm."""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be trained, and be in a model that is trained, even in ``torch.inference_mode``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluation_mode(survey: Survey) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was found in.

    The flags are set without ``train()`` and ``eval()``, which some modules override to do more (LoRA layers merge their
    weights there), and which exported programs refuse. Those that are right already are left alone: setting one takes long.
    """
    found = [module for module in survey.modules.values() if getattr(module, "training", False)]  # frozen scripts: none
    try:
        for module in found:
            module.training = False
        yield
    finally:
        for module in found:
            module.training = True


def batches_of(data: Iterable[Any], what: str, progress: bool | None) -> Iterator[Any]:
    """The batches of ``data``, with a progress bar.

    Raises:
        TypeError: ``data`` is a single batch, or cannot be iterated over.
        ValueError: ``data`` gives nothing.
    """
    if isinstance(data, Tensor | Mapping | str):
        raise TypeError(f"data must be an iterable of batches, got {describe(data)}: put a single batch into a list")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"data must be an iterable of batches, got {describe(data)}")
    shown = data if progress is False else tqdm(data, desc=what, unit="batch", disable=None if progress is None else False)
    batches = iter(shown)
    empty = object()
    first = next(batches, empty)
    if first is empty:
        raise ValueError("data gave no batch: it is empty, or an iterator that was used up before")
    return itertools.chain([first], batches)


def run_forward(
    survey: Survey,
    data: Iterable[Any],
    on_use: Callable[[WeightUse], None],
    *,
    forward: Forward | None,
    micro_batch: int | None,
    max_batches: int | None,
    progress: bool | None,
    takers: Mapping[str, Taker] | None = None,
    on_turn: Callable[[bool], object] = lambda is_last: None,
    at_once: int = AT_ONCE,
) -> Uses:
    """Feed the data through the model without gradients, with every use of a weight reported to ``on_use``.

    Args:
        takers: of :class:`WeightInterception`.
        on_turn: of offloaded weights, told whether the piece that goes on is the last one.
        at_once: if weights are offloaded, how many pieces go through the model together, block by block.

    Returns:
        Where else weights went.
    """
    if at_once < 1:
        raise ValueError(f"batches_at_once must be at least 1, got {at_once}")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    model, feed = survey.model, forward or default_forward
    multiplied = survey.multiplied if survey.sharded else survey.matrices
    parameters = {name: p for name in survey.matrices if unfit(p := multiplied[name]) is None}
    owners = [(survey.tied.get(name, name), *owner) for name, owner in survey.offloaded.items()]
    interception = WeightInterception(parameters, on_use, owners, takers)

    def run(index: int, piece: Any) -> None:
        with listening(interception.note_hidden), explained(index, piece):  # in a thread of its own
            feed(model, piece)

    with evaluation_mode(survey), torch.no_grad(), uncompiled():
        batches = enumerate(itertools.islice(batches_of(data, "calibrate", progress), max_batches))
        pieces = (
            (index, piece) for index, batch in batches for piece in split_batch(to_device(batch, survey.device), micro_batch)
        )
        if not survey.offloaded:
            for index, piece in pieces:
                with interception, explained(index, piece):
                    feed(model, piece)
            return interception
        presence = Presence(model)
        for together, are_last in _rounds(pieces, at_once):
            _run_round(
                [partial(run, *one) for one in together], are_last, presence, survey.device, interception, on_turn, progress
            )
    return interception


def _run_round(
    passes: list[Callable[[], None]],
    are_last: bool,
    presence: Presence,
    device: torch.device,
    interception: WeightInterception,
    on_turn: Callable[[bool], object],
    progress: bool | None,
) -> None:
    """Passes that go through an offloaded model together, block by block."""
    last = len(passes) - 1 if are_last else -1
    bar = tqdm(
        total=len(presence.blocks),
        desc=f"{len(passes)} at once",
        unit="block",
        disable=None if progress is None else not progress,
    )

    def turn(number: int) -> None:
        on_turn(number == last)

    def block(_: Any) -> None:
        bar.update()

    with bar, interception:
        in_step(passes, presence, device, on_turn=turn, on_block=block)


def _rounds(items: Iterable[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """So many items at a time, and whether they are the last ones."""
    left = iter(items)
    ahead = list(itertools.islice(left, size))
    while ahead:
        together, ahead = ahead, list(itertools.islice(left, 1))
        yield together, not ahead
        ahead += itertools.islice(left, size - 1) if ahead else ()


def uncompiled() -> Any:
    """Inside, compiled models run as they were written: compiled, they would hide their multiplications."""
    return torch.compiler.set_stance("force_eager")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(batch)``, ``model(batch[0])`` for a tuple or list, ``model(**batch)`` for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError("an empty tuple holds no input")
        return model(batch[0])
    return model(batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with ``function`` of each of its tensors, in containers of the same types."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, Mapping):  # unknown to pytree, as Hugging Face's BatchEncoding
            mapped: Any = copy.copy(leaf) if isinstance(leaf, MutableMapping) else dict(leaf)
            for key, value in leaf.items():
                mapped[key] = map_tensors(function, value)
            return mapped
        return leaf

    return pytree.tree_map(of_leaf, batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``, and with copies of what was made in ``torch.inference_mode``: no layer could
    change that in place."""

    def moved(t: Tensor) -> Tensor:
        t = t.to(device, non_blocking=True)
        return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t

    return moved(batch) if isinstance(batch, Tensor) else map_tensors(moved, batch)


def split_batch(batch: Any, size: int | None) -> Iterator[Any]:
    """The batch in pieces of ``size`` samples. The first tensor tells how many there are.

    Raises:
        ValueError: the batch holds no tensor to split.
    """
    if size is None:
        yield batch
        return
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(note, batch)
    samples = next((t.shape[0] for t in tensors if t.dim() > 0), None)
    if samples is None:
        raise ValueError(f"micro_batch finds no tensor to split in {describe(batch)}: let data give smaller batches")

    def piece(start: int) -> Any:
        def of(tensor: Tensor) -> Tensor:
            return tensor[start : start + size] if tensor.dim() > 0 and tensor.shape[0] == samples else tensor

        return map_tensors(of, batch)

    for start in range(0, max(samples, 1), size):
        yield piece(start)


@contextmanager
def explained(index: int, batch: Any) -> Iterator[None]:
    """Says which batch made a model's forward fail."""
    try:
        yield
    except (UnsupportedInputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the model's forward failed on batch {index} of data, {describe(batch)}: "
            f"{type(error).__name__}: {error} (forward= feeds a batch your way)"
        ) from error


def describe(batch: Any) -> str:
    """A batch in a few words."""
    if isinstance(batch, Tensor):
        return f"a {str(batch.dtype).removeprefix('torch.')} tensor of shape {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {list(batch)}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of ({', '.join(describe(item) for item in batch)})"
    return f"a {type(batch).__name__}"
