"""A timm model with its weights, and how it wants its images."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from fps_kernels.memory.planning import check_name
from fps_kernels.runs.checkpoints import is_torchs, read_checkpoint
from fps_kernels.runs.hints import install_hint
from fps_kernels.runs.progress import warn
from fps_kernels.tuning.beside import linear_shape
from fps_kernels.weights.roles import classifier_modules
from fps_kernels.weights.streaming import streamed


@dataclass(frozen=True)
class Loaded:
    """A model and what goes into it.

    Attributes:
        model: on its device, in its dtype.
        config: timm's data configuration: ``input_size``, ``mean``, ``std``, ``interpolation``, ...
        device: where it lies.
        dtype: of its parameters.
        files: where its weights stay, each read when its module runs; ``None`` where they are in memory.
    """

    model: nn.Module
    config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    files: Path | None = None

    @property
    def mode(self) -> str:
        """PIL's mode of its images."""
        return "L" if self.config["input_size"][0] == 1 else "RGB"

    def present(self) -> Any:
        """A context in which the model can run."""
        return nullcontext() if self.files is None else streamed(self.model, self.files, self.device)

    @property
    def heads(self) -> list[str]:
        """Patterns of the parameters of its classifiers."""
        return [f"{head}.*" for head in classifier_modules(self.model)]

    def is_of_head(self, name: str) -> bool:
        """Whether a parameter is one of its classifiers'."""
        return any(fnmatchcase(name, pattern) for pattern in self.heads)

    @property
    def not_linear(self) -> list[str]:
        """Weights that nothing can be added beside."""
        return [
            f"{path}.{leaf}" if path else leaf
            for path, module in self.model.named_modules()
            for leaf, p in module._parameters.items()
            if p is not None and p.dim() >= 2 and linear_shape(module, leaf) is None
        ]


def load_model(
    name: str,
    *,
    checkpoint: Path | None,
    pretrained: bool,
    classes: int,
    image_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    drop_path: float = 0.0,
    stream: bool = False,
) -> Loaded:
    """A timm model; its new head, and all of it where there is no checkpoint, is drawn by the seed. With ``stream`` its
    weights stay in the checkpoint.

    Raises:
        ValueError: see :func:`timm_model`; both of ``checkpoint`` and ``pretrained``; or images of a
            size that the model cannot take.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("give --checkpoint or --pretrained, not both")
    torch.manual_seed(seed)
    if stream:
        return _streaming(name, checkpoint, classes, image_size, dtype, device, drop_path)
    model = timm_model(name, checkpoint, classes, image_size, pretrained=pretrained, drop_path=drop_path)
    if checkpoint is None and not pretrained:
        warn(f"{name} has random weights: --checkpoint FILE or --pretrained gives it others")
    loaded = Loaded(model.to(device, dtype), _config(model, image_size), device, dtype)
    _try(name, loaded)
    return loaded


def _config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """timm's data configuration, for images of a size."""
    config: dict[str, Any] = dict(resolve_model_data_config(model))
    if image_size is not None:
        config |= {"input_size": (config["input_size"][0], image_size, image_size)}
    return config


def _streaming(
    name: str,
    checkpoint: Path | None,
    classes: int,
    image_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
    drop_path: float,
) -> Loaded:
    """A model without memory but for its heads, which are new."""
    if checkpoint is None:
        raise ValueError("--stream needs --checkpoint: the safetensors files in which weights stay")
    if is_torchs(checkpoint):
        raise ValueError(f"--stream reads weights from safetensors files, not from {checkpoint}")
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(install_hint("--stream", error), name=error.name) from error
    with init_empty_weights():
        model = timm_model(name, None, classes, image_size, drop_path=drop_path).to(dtype)
    for head in classifier_modules(model):
        module: Any = model.get_submodule(head).to_empty(device=device)
        module.reset_parameters()
    loaded = Loaded(model, _config(model, image_size), device, dtype, checkpoint)
    if (checkpoint_blocks := getattr(model, "set_grad_checkpointing", None)) is not None:
        checkpoint_blocks()
    else:
        warn(f"{name} checkpoints no blocks: a backward pass holds all of its weights")
    with loaded.present():
        _try(name, loaded)
    return loaded


@torch.no_grad()
def _try(name: str, loaded: Loaded) -> None:
    """One empty image, so that a size that does not fit is found before any work."""
    training = loaded.model.training
    try:
        loaded.model.eval()(torch.zeros(1, *loaded.config["input_size"], device=loaded.device, dtype=loaded.dtype))
    except (AssertionError, RuntimeError) as error:
        side = loaded.config["input_size"][-1]
        raise ValueError(f"{name} cannot take images of {side}×{side} (--image-size): {error}") from error
    finally:
        loaded.model.train(training)


def timm_model(
    name: str,
    checkpoint: Path | None,
    classes: int,
    image_size: int | None,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
    tensors: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A timm model with a new head, in float32.

    Args:
        name: of the architecture.
        checkpoint: a file as :func:`read_checkpoint` takes; position embeddings are resized. ``None``: random weights.
        classes: outputs of the head.
        image_size: side of the images, ``None`` for the model's own.
        pretrained: without a checkpoint, timm's own weights, from its cache or downloaded.
        drop_path: rate of stochastic depth.
        tensors: of the checkpoint, where it has been read already.

    Raises:
        ValueError: an unknown architecture or one that lacks an option; a file that is no checkpoint or lacks weights of the
            model; weights that cannot be had.
    """
    check_name(name)
    options: dict[str, Any] = {"num_classes": classes}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if image_size is not None:
        options["img_size"] = image_size
    if checkpoint is not None:
        found = read_checkpoint(checkpoint, names_of(name)) if tensors is None else dict(tensors)  # timm takes heads out
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": found}}
    elif pretrained:
        options["pretrained"] = True
    source = "timm's weights" if checkpoint is None else str(checkpoint)
    with _missing_weights() as missing:
        try:
            model = _created(name, options)
        except (RuntimeError, KeyError, OSError) as error:  # strict loading, shapes, the hub
            if "pretrained" not in options:
                raise
            raise ValueError(f"{source} cannot be loaded into {name}: {_one_line(error)}") from error
    heads = tuple(f"{head}." for head in classifier_modules(model))
    lacking = [key for key in missing if not key.startswith(heads)] if heads else missing
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"{source} cannot be loaded into {name}: it lacks {lacking[0]}{more}")
    return model.to(torch.float32)


def names_of(name: str) -> frozenset[str]:
    """Of the weights of an architecture of timm."""
    with torch.device("meta"):
        return frozenset(timm.create_model(name).state_dict())


def _created(name: str, options: dict[str, Any]) -> nn.Module:
    while True:
        try:
            model: nn.Module = timm.create_model(name, **options)
            return model
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused is None or refused[1] not in options:
                raise
            if refused[1] != "img_size":
                raise ValueError(f"{name} has no option {refused[1]}") from error
            del options["img_size"]  # a network of convolutions takes images of any size


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collects the names of weights that timm did not find in a checkpoint: it only logs them and leaves them random."""
    missing: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Missing keys \((.*)\) discovered", record.getMessage()):
                missing.extend(found[1].split(", "))

    logger, handler = logging.getLogger("timm.models._builder"), Note()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield missing
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """torch puts every key on a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[1:2] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines)
    return text if len(text) <= 300 else f"{text[:297]}…"
