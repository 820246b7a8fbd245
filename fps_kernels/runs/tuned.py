"""A tuned model from its base and its delta: what ``tune`` wrote about it says how to make it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from fps_kernels.deltas.delta import Delta
from fps_kernels.deltas.dense import merge_into_dense
from fps_kernels.runs.folders import ImageFiles
from fps_kernels.runs.images import ImageSet
from fps_kernels.runs.models import Loaded, load_model
from fps_kernels.weights.fingerprint import fingerprint


@dataclass(frozen=True)
class Tuned:
    """What a delta of ``tune`` says of its model.

    Attributes:
        delta: of the file.
        model: timm's name of the architecture.
        image_size: side of the images.
        classes: their names, in the order of the model's outputs.
    """

    delta: Delta
    model: str
    image_size: int
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Tuned":
        """From a file.

        Raises:
            ValueError: it is no delta, or one that ``fps-kernels tune`` did not write.
        """
        return cls.of(Delta.load(path), path)

    @classmethod
    def of(cls, delta: Delta, path: Path) -> "Tuned":
        """From a delta that was loaded from a file.

        Raises:
            ValueError: ``fps-kernels tune`` did not write it.
        """
        about: Mapping[str, Any] = delta.selection.description
        try:
            classes = tuple(str(name) for name in json.loads(about["classes"]))
            return cls(delta, about["model"], int(about["image_size"]), classes)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not say its model, image size and classes, as the deltas of fps-kernels tune do: in Python, "
                "fps.load_delta(...).apply_(model) applies it to any model"
            ) from error

    @property
    def is_timms(self) -> bool:
        """Whether timm has the architecture."""
        return bool(timm.is_model(self.model))

    def load(
        self,
        *,
        checkpoint: Path | None,
        pretrained: bool,
        dtype: torch.dtype,
        device: torch.device,
        drop_path: float = 0.0,
    ) -> Loaded:
        """The tuned model.

        Args:
            checkpoint: weights of its base.
            pretrained: or timm's own weights.
            dtype: of the weights.
            device: where it goes.
            drop_path: rate of stochastic depth.

        Raises:
            ValueError: no weights are given, they are of another base, or see :func:`load_model`.
        """
        if checkpoint is None and not pretrained:
            raise ValueError(
                f"the delta holds what was tuned of {self.model}: --checkpoint FILE or --pretrained gives its base"
            )
        loaded = load_model(
            self.model,
            checkpoint=checkpoint,
            pretrained=pretrained,
            classes=len(self.classes),
            image_size=self.image_size,
            dtype=dtype,
            device=device,
            seed=0,
            drop_path=drop_path,
        )
        known = self.delta.selection.description.get("frozen")
        if known is not None and known != fingerprint(loaded.model, without=self.delta.dense):
            raise ValueError(
                f"the delta was tuned on other weights of {self.model} than those of "
                f"{'timm' if checkpoint is None else checkpoint}: their fingerprints differ"
            )
        if self.delta.added:
            model = merge_into_dense(loaded.model, self.delta, dtype=dtype)
            return Loaded(model, loaded.config, device, dtype)
        self.delta.apply_(loaded.model, check_base=False)
        return loaded

    def labelled(self, images: ImageSet) -> ImageSet:
        """Images with the labels that the model has.

        Raises:
            ValueError: they have a class that the model lacks.
        """
        if images.classes == self.classes:
            return images
        if unknown := sorted(set(images.classes) - set(self.classes)):
            raise ValueError(
                f"{images.name} has the class {unknown[0]!r}, which the model lacks: it knows {_some(self.classes)}"
            )
        if not isinstance(images.dataset, ImageFiles):
            raise ValueError(f"the classes of {images.name} are in another order than those of the model")
        numbers = {name: i for i, name in enumerate(self.classes)}
        return ImageSet(images.name, images.dataset.with_labels(numbers), self.classes)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
