"""Feeding calibration data through a model without gradients, watching every weight, and leaving no trace behind."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fps_kernels import ops
from fps_kernels.interception import WeightInterception, WeightUse
from fps_kernels.matrices import is_simulated

Forward = Callable[[nn.Module, Any], Any]


class UnsupportedInputError(TypeError):
    """The input of a weight has a dtype that has no column norm."""


@dataclass
class ForwardPass:
    """What a forward pass showed about the parameters that no supported function took."""

    other_uses: dict[str, str]

    def reason_unused(self, name: str, parameter: Tensor) -> str:
        """Why a parameter has no statistics."""
        if parameter.dtype not in ops.FLOAT_DTYPES:
            return f"its dtype is {parameter.dtype}, not float32, bfloat16 or float16"
        if name in self.other_uses:
            return f"it reached {self.other_uses[name]}(), never a linear map or a 2-D convolution"
        return "it was never used in the forward pass"


def matrix_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter with two or more dimensions, by its first name."""
    return {name: p for name, p in model.named_parameters() if p.dim() >= 2}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was found in."""
    found = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in found:
            module.training = training


def run_forward(
    model: nn.Module,
    data: Iterable[Any],
    on_use: Callable[[WeightUse], None],
    *,
    forward: Forward | None,
    micro_batch: int | None,
    max_batches: int | None,
    progress: bool | None,
) -> ForwardPass:
    """Feed the data through the model without gradients, with every use of a weight reported to ``on_use``."""
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    check_has_values(model)
    parameters = matrix_parameters(model)
    feed = forward or default_forward
    interception = WeightInterception(parameters, on_use)
    count = 0
    # A compiled model would hide its multiplications, so that it runs as written during this pass.
    eager = torch.compiler.set_stance("force_eager")
    with evaluation_mode(model), torch.no_grad(), eager:
        for batch in tqdm(data, desc="calibrate", unit="batch", disable=None if progress is None else not progress):
            for piece in split_batch(to_device(batch, model_device(model)), micro_batch):
                with interception, explained(count, piece):
                    feed(model, piece)
            count += 1
            if count == max_batches:
                break
    if count == 0:
        raise ValueError("data gave no batch: it is empty, or an iterator that was used up before")
    return ForwardPass(interception.other_uses)


def check_has_values(model: nn.Module) -> None:
    """Refuse models whose parameters lie on the meta device."""
    for name, p in model.named_parameters():
        if p.is_meta and not is_simulated(p):
            raise ValueError(f"{name} is on the meta device and has no values: load the weights first")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(batch)``, ``model(batch[0])`` for a tuple or list, ``model(**batch)`` for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError("an empty tuple holds no input")
        return model(batch[0])
    return model(batch)


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter, where inputs go."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def split_batch(batch: Any, size: int | None) -> Iterator[Any]:
    """The batch in pieces of ``size`` samples."""
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0]
    samples = tensors[0].shape[0] if tensors else 0
    if size is None or samples <= size:
        yield batch
        return

    def piece(start: int) -> Any:
        return pytree.tree_map_only(
            Tensor, lambda t: t[start : start + size] if t.dim() > 0 and t.shape[0] == samples else t, batch
        )

    for start in range(0, samples, size):
        yield piece(start)


@contextmanager
def explained(index: int, batch: Any) -> Iterator[None]:
    """Says which batch made a model's forward fail."""
    try:
        yield
    except (UnsupportedInputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
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
