"""The chosen entries of a model: one CSR per weight, and the parameters that are trained whole."""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fps_kernels.ops.transfers import fetched
from fps_kernels.selection.weight_selection import WeightSelection
from fps_kernels.storage.checked_file import distrusted, read, texts, texts_by_name, write
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.survey import Survey

_FORMAT = "fps_kernels.selection.1"
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Mapping[str, WeightSelection]):
    """The chosen entries of a model: a mapping from parameter names to :class:`WeightSelection`.

    Supports ``in``, ``len``, iteration, ``|`` (union) and ``&`` (intersection; a weight that is trained whole contains
    every choice from it), and prints as a table.

    Attributes:
        weights: chosen entries by parameter name.
        dense: names of parameters to train whole: the classifier head and the biases outside norm layers.
        skipped: why every other matrix weight of the model has no entries here.
        tied: other names of shared parameters, by alias; their entries count once.
        description: how it was made: scorer, budget.

    Example:
        >>> selection = fps.select(model, loader, budget=fps.PerNeuron(1))
        >>> print(selection)
        >>> selection["blocks.0.attn.qkv.weight"].columns
    """

    weights: dict[str, WeightSelection]
    dense: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    description: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> WeightSelection:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def nnz(self) -> int:
        """Number of chosen entries of all weights."""
        return sum(w.nnz for w in self.weights.values())

    @property
    def density(self) -> float:
        """Chosen entries over all entries of the weights they were chosen from."""
        total = sum(w.layout.shape[0] * w.layout.shape[1] for w in self.weights.values())
        return self.nnz / total if total else 0.0

    def summary(self) -> list[dict[str, Any]]:
        """One row per weight: ``name``, ``shape``, ``chosen``, ``density`` and ``distinct_columns``."""
        return [
            {
                "name": name,
                "shape": w.layout.parameter_shape,
                "chosen": w.nnz,
                "density": w.density,
                "distinct_columns": int(w.columns.unique().numel()),
            }
            for name, w in self.weights.items()
        ]

    def __str__(self) -> str:
        width = max([len(name) for name in self.weights], default=6)
        lines = [f"{'weight':<{width}}  {'shape':>18}  {'chosen':>9}  {'density':>8}  {'columns':>13}"]
        for row in self.summary():
            shape = "×".join(str(size) for size in row["shape"])
            columns = f"{row['distinct_columns']} of {self.weights[row['name']].layout.shape[1]}"
            lines.append(f"{row['name']:<{width}}  {shape:>18}  {row['chosen']:>9}  {row['density']:>8.3%}  {columns:>13}")
        lines.append(f"{'total':<{width}}  {'':>18}  {self.nnz:>9}  {self.density:>8.3%}")
        notes = [f"{len(self.dense)} parameters trained whole"] if self.dense else []
        notes += [f"{len(self.skipped)} matrix weights not selected (.skipped says why)"] if self.skipped else []
        notes += [f"{len(self.tied)} tied names counted once"] if self.tied else []
        notes += [f"{key}: {value}" for key, value in self.description.items()]
        return "\n".join(lines + notes)

    def __repr__(self) -> str:
        return f"Selection(weights={len(self)}, nnz={self.nnz}, density={self.density:.4%}, dense={len(self.dense)})"

    def _repr_html_(self) -> str:
        """How a notebook shows it: one row per weight, or for deep models one per kind of weight."""
        from fps_kernels.selection.summary import html_of

        return html_of(self, f"Selection: {self.nnz:,} entries, {self.density:.3%}")

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def plot(self, chart: str = "map", against: "Selection | None" = None) -> Any:
        """A chart of the report, as a figure of plotly's: :func:`fps_kernels.report.figure`.

        Args:
            chart: ``map`` (where the entries lie), ``concentration`` (in how few columns), ``distinct`` (columns used),
                ``density`` or ``overlap``.
            against: for ``overlap``, another selection of the same model.

        Raises:
            ValueError: no such chart, or a selection without entries.
            ImportError: plotly is missing.
        """
        from fps_kernels.report import figure

        return figure(self, chart, against=against)

    def masks(self) -> dict[str, Tensor]:
        """A boolean mask in the shape of each parameter, by name."""
        return {name: w.mask() for name, w in self.weights.items()}

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], dense: tuple[str, ...] = ()) -> "Selection":
        """From boolean masks in the shapes of their parameters, by parameter name.

        Raises:
            TypeError: a mask that is not a boolean tensor.
            ValueError: a mask without dimensions.
        """
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must be a mapping of names to boolean tensors, got {type(masks).__name__}")
        weights = {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor):
                raise TypeError(f"the mask of {name} must be a boolean tensor, got {type(mask).__name__}")
            try:
                weights[name] = WeightSelection.from_mask(mask)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        return cls(weights, dense, description={"scorer": "given masks"})

    def to(self, device: torch.device | str) -> Self:
        """The same selection with its indices on ``device``."""
        if torch.device(device).type != "cpu":
            return replace(self, weights={name: w.to(device) for name, w in self.weights.items()})
        indices = iter(fetched([t for w in self.weights.values() for t in (w.row_offsets, w.columns)]))
        weights = {n: WeightSelection.trusted(w.layout, next(indices), next(indices)) for n, w in self.weights.items()}
        return replace(self, weights=weights)

    def exclude(self, *patterns: str) -> Self:
        """Without the weights whose names match a glob pattern.

        Raises:
            ValueError: a pattern that matches nothing.
        """
        for pattern in patterns:
            if not fnmatch.filter(self.weights, pattern):
                raise ValueError(f"pattern {pattern!r} matches none of the selected weights")
        kept = {n: w for n, w in self.weights.items() if not any(fnmatch.fnmatchcase(n, p) for p in patterns)}
        return replace(self, weights=kept)

    def _pairs(self, other: "Selection") -> Iterator[tuple[str, WeightSelection, WeightSelection]]:
        for name in self.weights.keys() & other.weights.keys():
            mine, theirs = self.weights[name], other.weights[name]
            if mine.layout != theirs.layout:
                raise ValueError(
                    f"the selections are of different models: {name} has shape {mine.layout.parameter_shape} in one and "
                    f"{theirs.layout.parameter_shape} in the other"
                )
            yield name, mine, theirs.to(mine.columns.device)

    def __or__(self, other: "Selection") -> "Selection":
        dense = tuple(dict.fromkeys((*self.dense, *other.dense)))
        weights = {name: w for name, w in {**self.weights, **other.weights}.items() if name not in dense}
        for name, mine, theirs in self._pairs(other):
            if name in weights:
                flat = torch.cat([mine.flat(), theirs.flat()]).unique()
                weights[name] = WeightSelection.from_flat(mine.layout, flat)
        return Selection(weights, dense, {n: r for n, r in self.skipped.items() if n not in weights}, dict(self.tied))

    def __and__(self, other: "Selection") -> "Selection":
        weights = {n: w for a, b in ((self, other), (other, self)) for n, w in a.weights.items() if n in b.dense}
        weights |= self._common(other)
        dense = tuple(n for n in self.dense if n in other.dense)
        return Selection(weights, dense, {n: r for n, r in self.skipped.items() if n not in weights}, dict(self.tied))

    def _common(self, other: "Selection") -> dict[str, WeightSelection]:
        """Entries that both have, of the weights that both choose from."""
        common = {}
        for name, mine, theirs in self._pairs(other):
            flat = mine.flat()
            both = flat[torch.isin(flat, theirs.flat(), assume_unique=True)]
            common[name] = WeightSelection.from_flat(mine.layout, both)
        return {name: common[name] for name in self.weights if name in common}

    def overlap(self, other: "Selection") -> float:
        """Common entries over the entries of the smaller selection: 1 where one contains the other, 0 if disjoint.

        Raises:
            ValueError: the two are of different models.
        """
        smaller = min(self.nnz, other.nnz)
        return sum(w.nnz for w in self._common(other).values()) / smaller if smaller else 1.0

    def check(self, model: nn.Module | Survey) -> dict[str, nn.Parameter]:
        """The model's parameters that this selection speaks of, by name.

        Raises:
            ValueError: a name the model lacks, or a parameter of another shape.
        """
        return self.pick(Survey.of(model).parameters)  # either name of a tied weight will do

    def pick(self, parameters: Mapping[str, T]) -> dict[str, T]:
        """Those of a model's parameters, or of a checkpoint's tensors, that this selection speaks of.

        Raises:
            ValueError: a name that is missing, or a parameter of another shape.
        """
        for name in (*self.weights, *self.dense):
            if name not in parameters:
                raise ValueError(f"the selection is of another model: this one has no parameter {name!r}")
        for name, w in self.weights.items():
            if tuple(parameters[name].shape) != w.layout.parameter_shape:
                raise ValueError(
                    f"the selection is of another model: {name} has shape {list(parameters[name].shape)} here, "
                    f"{list(w.layout.parameter_shape)} in the selection"
                )
        return {name: parameters[name] for name in (*self.weights, *self.dense)}

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file, at once: whoever is killed meanwhile leaves what was there before."""
        tensors = {}
        layouts = {}
        for name, w in self.weights.items():
            tensors[f"{name}:row_offsets"] = w.row_offsets.to("cpu", copy=True)  # two weights may share one choice
            tensors[f"{name}:columns"] = w.columns.to("cpu", copy=True)
            layouts[name] = w.layout.description()
        content = {
            "weights": layouts,
            "dense": list(self.dense),
            "skipped": self.skipped,
            "tied": self.tied,
            "description": self.description,
        }
        write(path, _FORMAT, content, tensors)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> "Selection":
        """Read a file written by :meth:`save`; every index is checked.

        Raises:
            ValueError: the file holds something else, is cut off or changed, or has indices that are no valid CSR.
            OSError: it cannot be read.
        """
        content, tensors = read(path, _FORMAT, "selection")
        with distrusted(path):
            weights = {}
            for name, described in content["weights"].items():
                layout = MatrixLayout.described(described)
                try:
                    chosen = WeightSelection(layout, tensors[f"{name}:row_offsets"], tensors[f"{name}:columns"])
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}: {error}") from error
                weights[name] = chosen.to(device)
            said = [texts_by_name(content[key]) for key in ("skipped", "tied", "description")]
            return cls(weights, tuple(texts(content["dense"])), *said)
