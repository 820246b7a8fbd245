"""The chosen entries of one attached weight: their values as a parameter, and where they lie."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fps_kernels import ops
from fps_kernels.selection import WeightSelection
from fps_kernels.weights.matrix import MatrixLayout, is_simulated

LIVING: "weakref.WeakSet[SelectedEntries]" = weakref.WeakSet()  # in this process, attached or not
NEARLY_ALL = 7 / 8  # of the columns: the whole input is kept as it is then, which costs less than to copy most of it


class SelectedEntries(nn.Module):
    """A child of the module that owns a weight, named ``<weight>_selected``: it makes the chosen values a parameter.

    As a module it is seen by whatever walks a model (optimizers by name, DDP, clipping, averaging, ``.to``), and it keeps
    itself out of ``state_dict``, where the tuned values stand under the weight's own name.

    Attributes:
        name: the weight's name in the model.
        selection: the chosen entries.
        values: float32 ``[nnz]`` in CSR order, whatever the dtype of the weight.
        distinct: int32 ``[D]``: the columns (of a convolution: the input channels) that carry entries, ascending; ``None``
            where all do, or nearly all.
        columns: int32 ``[nnz]``: the column of each entry, counted among ``distinct``.
        attached: whether the weight still follows ``values``.
    """

    distinct: Tensor | None

    def __init__(self, name: str, owner: nn.Module, weight: nn.Parameter, selection: WeightSelection) -> None:
        super().__init__()
        self.name = name
        self.attached = True
        self._place = [(owner, name.rpartition(".")[2], weight)]  # in a list, so that nothing is registered a second time
        self.selection = selection
        self.distinct, self.columns = _numbered(selection)
        if isinstance(weight, FakeTensor):
            if not is_simulated(selection.columns):
                self._move(weight.fake_mode.from_tensor)
        else:
            self._move(lambda index: index.to(weight.device))
        # Where the rows of an attention's three projections begin, known before a compiler asks.
        rows = self.layout.shape[0]
        self._begins: dict[int, int] = {}
        if not is_simulated(selection.row_offsets):
            thirds = [0, rows // 3, 2 * (rows // 3), rows]
            self._begins = dict(zip(thirds, selection.row_offsets[thirds].tolist(), strict=True))
        self.values = nn.Parameter(self._held().float())
        self._link()

    def _link(self) -> None:
        LIVING.add(self)
        self.values.selected_entries = self  # type: ignore[attr-defined]
        if self._place:
            self.mark_written()

    @property
    def weight(self) -> nn.Parameter:
        """The weight in the model.

        Raises:
            ValueError: the tuner is detached.
        """
        if not self._place:
            raise ValueError(f"the tuner of {self.name} is detached")
        return self._place[0][2]

    def check_place(self) -> None:
        """Refuse to go on where the model has another weight by now.

        Raises:
            ValueError: the tuner is detached, or the weight was replaced.
        """
        weight = self.weight
        owner, leaf, _ = self._place[0]
        if owner._parameters.get(leaf) is not weight:
            raise ValueError(f"{self.name} was replaced since attach(): its selected values reach no weight; attach again")

    def release(self) -> nn.Parameter:
        """Leave the module that owns the weight, and let go of both."""
        owner, leaf, weight = self._place.pop()
        self.attached = False
        owner._modules.pop(f"{leaf}_selected", None)
        return weight

    @property
    def layout(self) -> MatrixLayout:
        """How the weight is read as a matrix."""
        return self.selection.layout

    @property
    def row_offsets(self) -> Tensor:
        """int32 ``[O + 1]``."""
        return self.selection.row_offsets

    def begin_of(self, row: int) -> int:
        """Number of entries in the rows before ``row``."""
        if row not in self._begins:
            self._begins[row] = int(self.row_offsets[row])
        return self._begins[row]

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        shared = self.columns is self.selection.columns
        self.selection = WeightSelection.trusted(self.layout, fn(self.row_offsets), fn(self.selection.columns))
        self.columns = self.selection.columns if shared else fn(self.columns)
        self.distinct = None if self.distinct is None else fn(self.distinct)

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight's memory as a matrix, with the CSR of the entries there."""
        with torch._C.DisableTorchFunctionSubclass():
            view, columns = self.selection.in_memory(self.weight)
        return view, self.row_offsets, columns

    def _held(self) -> Tensor:
        view, _, columns = self.memory()
        return view[self.selection.rows(), columns.long()]

    def mark_written(self) -> None:
        """Note that the weight holds the values as they are now."""
        self._seen = _state(self.values), _state(self.weight)

    def synchronise(self) -> None:
        """Let the weight and the values agree again, after whatever changed one of them; if both, the values count.

        Changes through ``.data`` in place leave no trace: :meth:`write_back` is for those.
        """
        values, weight = self._seen
        if values != _state(self.values):
            self.write_back()
        elif weight != _state(self.weight):
            self.read_back()

    def check_devices(self) -> None:
        """Refuse values that were moved away from their weight."""
        if self.values.device != self.weight.device:
            raise ValueError(
                f"{self.name} is on {self.weight.device}, its selected values are on {self.values.device}: move the whole "
                "model with model.to(device)"
            )

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the weight; every other entry keeps its bits."""
        self.check_place()
        self.check_devices()
        ops.scatter_values_(*self.memory(), self.values.detach())
        self.mark_written()

    @torch.no_grad()
    def read_back(self) -> None:
        """Take over what the weight holds now, except where that is the rounded value already."""
        held = self._held()
        self.values.copy_(torch.where(held == self.values.to(held.dtype), self.values, held.float()))
        self.mark_written()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.synchronise()
        # Moving to another device moves everything, but `.to(bfloat16)` leaves the values float32, and what allocates
        # without copying (`to_empty`) must not touch indices that kernels trust.
        super()._apply(lambda values: values.to(fn(values).device), recurse)  # type: ignore[no-untyped-call]
        device = self.values.device
        self._move(lambda index: index.to(device))
        self._link()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.synchronise()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.read_back()  # a module loads before its children: the weight holds what was loaded

    def __setstate__(self, state: dict[str, Any]) -> None:  # copy.deepcopy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.selection.nnz} of {self.layout.shape[0] * self.layout.shape[1]} entries of {self.name}"


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Changes whenever a tensor's numbers do, as far as torch can tell."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor._version, tensor.untyped_storage()._cdata, tensor.storage_offset()


def entries_of(parameter: Tensor) -> SelectedEntries | None:
    """The entries whose values a parameter is, if it is such a parameter."""
    return getattr(parameter, "selected_entries", None)


def _numbered(selection: WeightSelection) -> tuple[Tensor | None, Tensor]:
    """The columns (input channels) that carry entries, and the column of each entry counted among them."""
    kernel = selection.layout.columns_per_channel
    if is_simulated(selection.columns):
        return None, selection.columns
    with unset_fake_temporarily():  # the indices of a simulated weight are real: what is kept for backward depends on them
        places = selection.columns.long()
        distinct, position = (places // kernel).unique(return_inverse=True)
        if distinct.numel() * kernel >= NEARLY_ALL * selection.layout.shape[1]:
            return None, selection.columns
        return distinct.int(), (position * kernel + places % kernel).int()
