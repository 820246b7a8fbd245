"""What there is to say of each weight: how many entries, in which columns, how concentrated."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fps_kernels.selection import Selection
from fps_kernels.selection.summary import kind_of

MOST_KINDS = 8  # as many colours as can be told apart


@dataclass(frozen=True)
class Layer:
    """One weight ``[O, C]`` and its chosen entries.

    Attributes:
        name: of the parameter.
        shape: of the parameter, such as ``384×1536``.
        counts: int64 ``[C]``: chosen entries in each column.
        entries: ``O * C``.
        overlap: common entries over those of the smaller choice, ``None`` where one of them has none.
    """

    name: str
    shape: str
    counts: Tensor
    entries: int
    overlap: float | None

    @property
    def chosen(self) -> int:
        """Number of chosen entries."""
        return int(self.counts.sum())

    @property
    def columns(self) -> int:
        """``C``."""
        return self.counts.numel()

    @property
    def density(self) -> float:
        """Share of the entries that is chosen."""
        return self.chosen / self.entries if self.entries else 0.0

    @property
    def distinct(self) -> int:
        """Columns with at least one chosen entry."""
        return int((self.counts > 0).sum())

    @property
    def kind(self) -> str:
        """See :func:`kind_of`."""
        return kind_of(self.name)

    @property
    def short(self) -> str:
        """Numbers and the last part of the name: ``3 · qkv``."""
        parts = self.name.removesuffix(".weight").split(".")
        return " · ".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])

    def binned(self, bins: int) -> list[float]:
        """Chosen entries of a column over their mean over all columns, for ``bins`` equal parts of the columns."""
        mean = self.chosen / self.columns
        if self.columns < bins:  # several parts show the same column
            values = self.counts[torch.arange(bins) * self.columns // bins].double()
        else:
            part = torch.arange(self.columns) * bins // self.columns
            sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, part, self.counts.double())
            values = sums / torch.bincount(part, minlength=bins)
        return [float(v) for v in values / mean] if mean else [0.0] * bins

    def lorenz(self, points: int) -> Tensor:
        """Share of the chosen entries in the fullest columns, ``[points + 1]``, for shares 0, 1/points, ..., 1 of them."""
        falling = self.counts.sort(descending=True).values.double()
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), falling.cumsum(0)]) / max(1, self.chosen)
        place = torch.linspace(0, self.columns, points + 1, dtype=torch.float64)
        low = place.floor().long().clamp(max=self.columns - 1)
        return sums[low] + (place - low) * (sums[low + 1] - sums[low])

    def share_of_fullest(self, share: float) -> float:
        """Share of the chosen entries that lies in the fullest ``share`` of the columns."""
        points = round(1 / share)
        return float(self.lorenz(points)[1])


def layers_of(selection: Selection, against: Selection | None) -> list[Layer]:
    """The weights of a selection, in their order.

    Raises:
        ValueError: ``against`` is of another model.
    """
    layers = []
    for name, w in selection.items():
        if w.layout.shape[1] == 0:
            continue
        counts = torch.bincount(w.columns.cpu().long(), minlength=w.layout.shape[1])
        overlap = None
        if against is not None and name in against and w.nnz and against[name].nnz:
            overlap = Selection({name: w}).overlap(Selection({name: against[name]}))
        shape = "×".join(map(str, w.layout.parameter_shape))
        layers.append(Layer(name, shape, counts, w.layout.shape[0] * w.layout.shape[1], overlap))
    return layers


@dataclass(frozen=True)
class Group:
    """Weights of one kind, which have the same name and colour in every chart."""

    label: str
    colour: int
    members: list[Layer]

    def only(self, layers: list[Layer]) -> "Group":
        """Those of its weights that are in a list."""
        names = {layer.name for layer in layers}
        return replace(self, members=[m for m in self.members if m.name in names])


def groups_of(layers: list[Layer]) -> list[Group]:
    """Weights by kind; where there are more kinds than colours, the rarest together."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    if len(kinds) > MOST_KINDS:
        frequent = sorted(kinds, key=lambda kind: -sum(m.chosen for m in kinds[kind]))[: MOST_KINDS - 1]
        others = [layer for layer in layers if layer.kind not in frequent]
        kinds = {kind: kinds[kind] for kind in kinds if kind in frequent} | {f"{len(others)} others": others}
    return [Group(kind, i, members) for i, (kind, members) in enumerate(kinds.items())]
