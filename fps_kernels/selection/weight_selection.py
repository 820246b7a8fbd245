"""The chosen entries of one weight: a CSR, validated when it is made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fps_kernels.ops.transfers import sent
from fps_kernels.weights.matrix import MatrixLayout, is_simulated
from fps_kernels.weights.shards import Piece


@dataclass(frozen=True, eq=False)
class WeightSelection:
    """The chosen entries of one weight, in CSR order of its matrix ``[O, C]``.

    Attributes:
        layout: how the parameter is read as a matrix.
        row_offsets: int32 ``[O + 1]``: row ``i`` owns ``columns[row_offsets[i]:row_offsets[i + 1]]``.
        columns: int32 ``[nnz]``, ascending within each row.

    Raises:
        TypeError: indices that are not int32.
        ValueError: indices that are no valid CSR of the matrix.
    """

    layout: MatrixLayout
    row_offsets: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        O, C = self.layout.shape
        for label, tensor in (("row_offsets", self.row_offsets), ("columns", self.columns)):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{label} must be int32, got {tensor.dtype}")
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(f"{label} must be one-dimensional and contiguous, got shape {list(tensor.shape)}")
        if self.row_offsets.numel() != O + 1:
            raise ValueError(f"row_offsets must have {O + 1} items for {O} rows, got {self.row_offsets.numel()}")
        if self.row_offsets.device != self.columns.device:
            raise ValueError(f"row_offsets are on {self.row_offsets.device}, columns on {self.columns.device}")
        if is_simulated(self.columns):
            return
        lengths = self.row_offsets.diff()
        if int(self.row_offsets[0]) != 0 or int(self.row_offsets[-1]) != self.columns.numel() or bool((lengths < 0).any()):
            raise ValueError(f"row_offsets must rise from 0 to the {self.columns.numel()} columns")
        if self.columns.numel():
            low, high = (int(v) for v in self.columns.aminmax())
            if low < 0 or high >= C:
                raise ValueError(f"columns must lie in [0, {C}), found {low if low < 0 else high}")
            descends = self.columns.diff() <= 0
            starts = self.row_offsets[1:-1].long()
            starts = starts[(starts > 0) & (starts < self.columns.numel())]
            descends[starts - 1] = False  # from the last column of a row to the first of the next
            if bool(descends.any()):
                raise ValueError("columns must ascend, without repetition, within each row")

    @classmethod
    def trusted(cls, layout: MatrixLayout, row_offsets: Tensor, columns: Tensor) -> "WeightSelection":
        """Without any check: for indices that an op made, or that were checked before."""
        made = object.__new__(cls)
        for name, value in (("layout", layout), ("row_offsets", row_offsets), ("columns", columns)):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def whole(cls, layout: MatrixLayout, device: torch.device | str = "cpu") -> "WeightSelection":
        """Every entry of a weight."""
        rows, columns = layout.shape
        every = torch.arange(columns, dtype=torch.int32, device=device).repeat(rows)
        return cls.trusted(layout, uniform_row_offsets(rows, columns, device), every)

    @property
    def nnz(self) -> int:
        """Number of chosen entries."""
        return self.columns.numel()

    @property
    def density(self) -> float:
        """Share of the weight's entries that is chosen."""
        O, C = self.layout.shape
        return self.nnz / (O * C) if O * C else 0.0

    def rows(self) -> Tensor:
        """The row of each entry, int64 ``[nnz]``."""
        lengths = self.row_offsets.diff().long()
        every_row = torch.arange(lengths.numel(), device=lengths.device)
        return torch.repeat_interleave(every_row, lengths, output_size=self.nnz)

    def flat(self) -> Tensor:
        """Row-major positions of the entries in the matrix, int64 ``[nnz]``, ascending."""
        return self.rows() * self.layout.shape[1] + self.columns

    def in_memory(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Where the entries lie in the memory of a parameter, on whose device the indices must be.

        Returns:
            That memory as a matrix, and the column of each entry in it, int32 ``[nnz]``: in a channels-last convolution they
            are in another order than in the weight's matrix. Rows may overlap where a weight's dimensions are in an order
            of their own.

        Raises:
            ValueError: strides that allow no view as a matrix.
        """
        view, positions, jumps = self.layout.memory(parameter)
        columns = self.columns if positions is None else positions[self.columns.long()]
        return view, columns if jumps is None else columns + jumps[self.rows()]

    def of(self, parameter: Tensor) -> Tensor:
        """What a parameter holds at the entries ``[nnz]``, without a copy of the rest."""
        view, columns = self.in_memory(parameter)
        return view[self.rows(), columns.long()]

    def mask(self) -> Tensor:
        """Boolean tensor in the shape of the parameter."""
        O, C = self.layout.shape
        mask = torch.zeros(O * C, dtype=torch.bool, device=self.columns.device)
        mask[self.flat()] = True
        return self.layout.unmatrix(mask.view(O, C))

    def to(self, device: torch.device | str) -> "WeightSelection":
        """The same entries with their indices on ``device``."""
        if self.columns.device == torch.device(device):
            return self
        return WeightSelection.trusted(self.layout, sent(self.row_offsets, device), sent(self.columns, device))

    def within(self, piece: Piece) -> tuple[slice | Tensor, "WeightSelection"]:
        """The entries that lie in a piece of the weight.

        Returns:
            Which they are, in CSR order, and a selection of the piece.
        """
        first, last = piece.rows
        if piece.columns == (0, self.layout.shape[1]):
            begin, end = self.row_offsets[[first, last]].tolist()
            offsets = self.row_offsets[first : last + 1] - begin
            return slice(begin, end), WeightSelection.trusted(piece.layout, offsets, self.columns[begin:end].clone())
        inside = (self.columns >= piece.columns[0]) & (self.columns < piece.columns[1])
        offsets = row_offsets_of(torch.bincount(self.rows()[inside], minlength=last))
        columns = self.columns[inside] - piece.columns[0]
        return inside.nonzero().squeeze(1), WeightSelection.trusted(piece.layout, offsets, columns)

    @classmethod
    def from_flat(cls, layout: MatrixLayout, flat: Tensor) -> "WeightSelection":
        """From distinct row-major positions in the matrix, int64, ascending."""
        O, C = layout.shape
        rows = flat // max(C, 1)
        return cls(layout, row_offsets_of(torch.bincount(rows, minlength=O)), (flat - rows * C).int())

    @classmethod
    def from_mask(cls, mask: Tensor, row_dims: tuple[int, ...] = (0,)) -> "WeightSelection":
        """From a boolean tensor in the shape of the parameter, whose dimensions ``row_dims`` count output neurons."""
        if mask.dtype != torch.bool:
            raise TypeError(f"a mask must be boolean, got {mask.dtype}")
        if mask.dim() == 0:
            raise ValueError("a mask must have at least one dimension")
        layout = MatrixLayout(tuple(mask.shape), row_dims)
        return cls.from_flat(layout, layout.matrix(mask).flatten().nonzero().squeeze(1))


def uniform_row_offsets(rows: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """``row_offsets`` of a CSR in which every row has as many entries, int32 ``[rows + 1]``."""
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * length


def row_offsets_of(lengths: Tensor) -> Tensor:
    """``row_offsets`` of a CSR whose rows have so many entries each, int32 ``[rows + 1]``."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)]).int()
