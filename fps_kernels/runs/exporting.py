"""A tuned model as files that others load: timm's own, ``torch.export``'s and ONNX."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from fps_kernels.runs.hints import install_hint
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.progress import note
from fps_kernels.storage.atomic import replaced_at_once

_BATCH = 2  # of the example: export takes a size of 1 for a fixed one
_TOLERANCE = 1e-3  # of logits, times the largest of them


def export_timm(loaded: Loaded, classes: tuple[str, ...], output: Path) -> None:
    """A folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``: safetensors and a configuration with class
    names.

    Raises:
        ValueError: the folder is there and holds something else.
    """
    if output.exists() and (
        not output.is_dir() or any(p.name not in ("config.json", "model.safetensors") for p in output.iterdir())
    ):
        raise ValueError(f"{output} is there already and is no exported model: give another folder")
    save_for_hf(
        loaded.model,
        str(output),
        model_config={"label_names": list(classes)},
        safe_serialization=True,
        data_config={key: loaded.config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    )


def export_torch(loaded: Loaded, classes: tuple[str, ...], output: Path) -> None:
    """A program for ``torch.export.load``, for batches of any size.

    Raises:
        ValueError: what it computes is not what the model computes.
    """
    example = _example(loaded)
    program = torch.export.export(loaded.model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    held = io.BytesIO()  # by a path it takes files that end with .pt2 alone, which temporary ones do not
    torch.export.save(program, held)
    with replaced_at_once(output) as temporary:
        temporary.write_bytes(held.getvalue())
    _compare(loaded, output, torch.export.load(output).module())
    _describe(loaded, classes, output)


def export_onnx(loaded: Loaded, classes: tuple[str, ...], output: Path) -> None:
    """An ONNX file for batches of any size, with the input ``images`` and the output ``logits``.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: what it computes is not what the model computes, as far as onnxruntime is there to tell.
    """
    try:
        # Torch imports them when it is too late for a message of ours.
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        hint = install_hint("exporting to ONNX", error, "onnx", "onnxscript")
        raise ImportError(hint, name=error.name) from error
    with replaced_at_once(output) as temporary:
        torch.onnx.export(
            loaded.model,
            (_example(loaded),),
            str(temporary),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    _describe(loaded, classes, output)
    try:
        import onnxruntime
    except ImportError:
        note(f"{output} was not run, since onnxruntime is not installed: pip install onnxruntime")
        return
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    _compare(loaded, output, lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]))


def save_weights(model: nn.Module, classes: tuple[str, ...], metadata: dict[str, str], output: Path) -> None:
    """One safetensors file of a model's weights, with its class names."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with replaced_at_once(output) as temporary:
        save_file(tensors, temporary, {**metadata, "classes": json.dumps(list(classes), ensure_ascii=False), "format": "pt"})


def _example(loaded: Loaded, images: int = _BATCH) -> Tensor:
    return torch.rand(images, *loaded.config["input_size"], generator=torch.Generator().manual_seed(0), device="cpu")


@torch.no_grad()
def _compare(loaded: Loaded, output: Path, run: Callable[[Tensor], Any]) -> None:
    for images in (1, _BATCH + 1):
        x = _example(loaded, images)
        expected, found = loaded.model(x), run(x)
        error, size = float((found - expected).abs().max()), float(expected.abs().max())
        if not error <= _TOLERANCE * size:
            raise ValueError(f"{output} computes something else than the model: logits of {size:.3g} differ by {error:.3g}")


def _describe(loaded: Loaded, classes: tuple[str, ...], output: Path) -> None:
    """What has to be done to an image first, and what the outputs mean."""
    shown = {key: loaded.config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    with replaced_at_once(output.with_suffix(".json")) as temporary:
        text = json.dumps({"classes": list(classes), **shown}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
