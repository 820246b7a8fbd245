"""A dense model of a quantised one, with what was tuned beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.deltas.delta import Delta
from fps_kernels.tuning.beside import AddedEntries, linear_shape
from fps_kernels.weights.matrix import computes_its_numbers


@torch.no_grad()
def merge_into_dense(model: nn.Module, delta: Delta | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every quantised linear layer by a plain one, with the tuned entries in it.

    Known are bitsandbytes' 4- and 8-bit layers, tensors that have ``dequantize()`` as torchao's, and layers that have it as
    HQQ's. The plain weights are what these say that they hold: rounded as they were quantised, plus what was tuned.

    Args:
        model: a quantised model that is not attached; changed in place.
        delta: from ``attach(model, selection, beside=True)``; nothing is added without it: a dequantised model, from which
            one can choose.
        dtype: of the plain weights.

    Returns:
        The model.

    Raises:
        ValueError: a delta of another model, or one that is not added beside its base; an attached model. The model is
            unchanged then.

    Example:
        >>> dense = fps.merge_into_dense(load_in_4_bits(), fps.load_delta("task.safetensors"))
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if attached := next((m.name for m in modules.values() if isinstance(m, AddedEntries)), None):
        raise ValueError(f"{attached} is attached: save a delta and detach its tuner first")
    weights = {} if delta is None else delta.selection.weights
    if delta is not None:
        if not delta.added:
            raise ValueError("the delta holds weights, and is applied to a plain model: delta.apply_(model)")
        for name, w in weights.items():
            layer = modules.get(name.rpartition(".")[0])
            if layer is None or linear_shape(layer) != w.layout.shape:
                raise ValueError(f"the delta is of another model: this one has no {name} of {list(w.layout.shape)}")
        parameters = dict(model.named_parameters())
        for name, values in delta.dense.items():
            if name not in parameters or parameters[name].shape != values.shape:
                raise ValueError(f"the delta is of another model: this one has no {name} of {list(values.shape)}")
        for name, values in delta.dense.items():
            parameters[name].copy_(values)
    made: dict[nn.Module, nn.Linear] = {}
    for path, layer in modules.items():
        chosen = weights.get(f"{path}.weight" if path else "weight")
        shape, read = linear_shape(layer), _reader(layer)
        if shape is None or (read is None and chosen is None):
            continue
        if layer not in made:
            weight = (layer.weight.detach() if read is None else read()).to(dtype, copy=True)
            weight = weight.reshape(shape)
            if chosen is not None and delta is not None:
                here = chosen.to(weight.device)
                sums = here.of(weight).float() + delta.values[f"{path}.weight" if path else "weight"].to(weight.device)
                ops.scatter_values_(weight, here.row_offsets, here.columns, sums)
            made[layer] = _plain(layer, weight)
        if not path:
            return made[layer]
        parent, _, leaf = path.rpartition(".")
        modules[parent]._modules[leaf] = made[layer]
    return model


def _plain(layer: nn.Module, weight: Tensor) -> nn.Linear:
    bias = getattr(layer, "bias", None)
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=bias.requires_grad)
    return plain.train(layer.training)


def _reader(layer: nn.Module) -> Callable[[], Tensor] | None:
    """What gives the numbers of a quantised layer's weight; ``None`` where the weight is plain or unknown."""
    weight: Any = getattr(layer, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return lambda: dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        state: Any = layer.state
        scales = weight.SCB if state.SCB is None else state.SCB
        return lambda: weight.data.float() * (scales / 127).unsqueeze(1)
    if isinstance(weight, Tensor) and computes_its_numbers(weight) and hasattr(weight, "dequantize"):
        return weight.dequantize
    own: Callable[[], Tensor] | None = getattr(layer, "dequantize", None)
    return None if isinstance(weight, Tensor) else own
