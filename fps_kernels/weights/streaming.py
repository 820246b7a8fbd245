"""Models whose weights stay in safetensors files: each is read when its module runs, and let go of afterwards.

The hooks that do so are accelerate's; what is added here is the map from a model's names to the tensors in its files, with
every check of it before anything runs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fps_kernels.weights.survey import Survey

INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@contextmanager
def streamed(model: nn.Module, checkpoint: str | PathLike[str], device: torch.device | str = "cpu") -> Iterator[nn.Module]:
    """Inside, a model that was built without memory runs with the weights of a checkpoint, module by module.

    Nothing is copied and nothing is written: at most the parameters of one module are in memory, beside what the operating
    system keeps of the files. Afterwards the model is as it was. It can be trained with ``attach(..., beside=True)``; let
    its blocks be checkpointed then, so that a backward pass reads each of them once more and holds one at a time.

    Args:
        model: with parameters on the meta device, as ``accelerate.init_empty_weights()`` makes them. Modules all of whose
            own parameters have values, as a new head, stay as they are. Buffers that a checkpoint does not hold must have
            values; those that it holds are taken from there.
        checkpoint: a ``.safetensors`` file, an index of several (``model.safetensors.index.json``), or a folder with either.
        device: where it runs.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: a parameter that the files do not have or have in another shape, files that are no safetensors, a buffer
            without values, a parameter that has values already.
        OSError: a file cannot be read.

    Example:
        >>> with init_empty_weights():
        ...     model = build()
        >>> with streamed(model, "model.safetensors"):
        ...     y = model(x)
    """
    try:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
        from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
    except ImportError as error:
        raise ImportError("weights are streamed by accelerate, which is not installed: pip install accelerate") from error
    survey = Survey.of(model)
    resident = {m for m in survey.modules.values() if _is_resident(m)}
    index = _index(survey, _tensors(Path(checkpoint)), resident)
    loader = OffloadedWeightsLoader(index=index)
    buffers = {name: b for name, b in model.named_buffers() if name in index}
    try:
        for name in buffers:
            _set_buffer(model, name, loader[name].to(device))
        for path, module in model.named_modules():
            if module not in resident and (module._parameters or module._buffers):
                files = PrefixedDataset(loader, f"{path}." if path else "")
                hook = AlignDevicesHook(execution_device=torch.device(device), offload=True, weights_map=files)
                add_hook_to_module(module, hook, append=True)
        yield model
    finally:
        remove_hook_from_module(model, recurse=True)
        for name, buffer in buffers.items():
            _set_buffer(model, name, buffer)


def _is_resident(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, all with values."""
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not any(p.is_meta for p in own)


def _set_buffer(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = value


def _files(checkpoint: Path) -> list[Path]:
    if checkpoint.is_dir():
        index, single = checkpoint / INDEX, sorted(checkpoint.glob("*.safetensors"))
        if index.is_file():
            checkpoint = index
        elif len(single) == 1:
            checkpoint = single[0]
        else:
            raise ValueError(f"{checkpoint} holds {len(single)} .safetensors files and no {INDEX}: name one of them")
    if checkpoint.suffix != ".json":
        return [checkpoint]
    try:
        names = json.loads(checkpoint.read_text())["weight_map"].values()
        return [checkpoint.parent / str(name) for name in dict.fromkeys(names)]
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{checkpoint} is no index of safetensors files: it has no weight_map") from error


def _tensors(checkpoint: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and dtype of every tensor of a checkpoint; no tensor is read."""
    found = {}
    for path in _files(checkpoint):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    part = file.get_slice(name)
                    found[name] = path, tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or is cut off: {error}") from error
    return found


def _index(
    survey: Survey, tensors: Mapping[str, tuple[Path, tuple[int, ...], str]], resident: set[nn.Module]
) -> dict[str, dict[str, Any]]:
    """What accelerate asks of every parameter that is not resident: where it is."""
    if not any(p.is_meta for p in survey.parameters.values()):
        resident = set()  # nothing would be streamed: the first parameter is said to have values
    here = {name for name in survey.parameters if survey.owner(name)[0] in resident}
    persistent = {f"{path}.{leaf}" if path else leaf for path, m in survey.modules.items() for leaf in m._buffers
                  if leaf not in m._non_persistent_buffers_set}  # fmt: skip
    wanted: dict[str, torch.Tensor] = {name: p for name, p in survey.parameters.items() if name not in here}
    kept = {id(b) for m in resident for b in m._buffers.values()}
    for name, b in survey.model.named_buffers():  # those that have values of their own may have others in the files
        if b.is_meta or (name in tensors and id(b) not in kept):
            wanted[name] = b
    groups: dict[int, list[str]] = {}
    for name, p in survey.parameters.items():
        groups.setdefault(id(p), []).append(name)
    index = {}
    for name, t in wanted.items():
        if not t.is_meta and name in survey.parameters:
            raise ValueError(f"{name} has values already: build the model with accelerate.init_empty_weights()")
        names = [name, *groups.get(id(t), ())]
        there = next((other for other in names if other in tensors), None)
        if there is None:
            kind = "" if name in survey.parameters or name in persistent else ", nor should it: build the model with "
            more = "accelerate.init_empty_weights(), which gives buffers values" if kind else ""
            if not kind:
                more = "; if it is shared with another parameter, share it after init_empty_weights(): model.tie_weights()"
            raise ValueError(f"the checkpoint has no {name}{kind}{more}")
        path, shape, dtype = tensors[there]
        if shape != tuple(t.shape):
            raise ValueError(
                f"{name} has shape {list(t.shape)} in the model and {list(shape)} in {path.name}: weights that stay in "
                "their files are not resized, so that the model has to be built for the same image size and classes"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is {dtype} in {path.name}, which is not served")
        index[name] = {
            "safetensors_file": str(path),
            "weight_name": there,
            "dtype": str(_DTYPES[dtype]).removeprefix("torch."),
        }
    return index
