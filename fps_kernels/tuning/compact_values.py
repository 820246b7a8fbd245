"""The chosen entries of one attached weight: their values as a parameter, and where they lie."""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fps_kernels import ops
from fps_kernels.ops.transfers import note_on_host, sent
from fps_kernels.selection import WeightSelection
from fps_kernels.tuning.agreement import Agreement, Seen
from fps_kernels.tuning.saved_input import NEARLY_ALL
from fps_kernels.weights.matrix import MatrixLayout, is_simulated

LIVING: "weakref.WeakSet[SelectedEntries]" = weakref.WeakSet()  # in this process, attached or not


class SelectedEntries(nn.Module):
    """A child of the module that owns a weight, named ``<weight>_selected``: it makes the chosen values a parameter.

    As a module it is seen by whatever walks a model (optimizers by name, DDP, clipping, averaging, ``.to``), and it keeps
    itself out of ``state_dict``, where the tuned values stand under the weight's own name.

    Attributes:
        name: the weight's name in the model.
        selection: the chosen entries; made from one whose indices are on the CPU.
        values: float32 ``[nnz]`` in CSR order, whatever the dtype of the weight.
        own: the parameter ``values``; where ``values`` is another tensor, a functional call has put it there for a while.
        agreed: float32 ``[nnz]``: the values when they and the weight agreed last.
        seen: what multiplications need to know, and what told of both sides then; ``None`` once detached.
        hold: makes the weight know its entries, where it does not (any more: torch may swap what two tensors are).
        alone: lets this weight and its values agree.
        distinct: int32 ``[D]``: the columns (of a convolution: the input channels) that carry entries, ascending; ``None``
            where all do, or nearly all.
        columns: int32 ``[nnz]``: the column of each entry, counted among ``distinct``.
        attached: whether the weight still follows ``values``.
    """

    distinct: Tensor | None
    own: nn.Parameter
    is_sharded = False  # see :mod:`.sharded_entries`

    def __init__(
        self,
        name: str,
        owner: nn.Module,
        weight: nn.Parameter,
        selection: WeightSelection,
        hold: "Callable[[SelectedEntries], None]",
    ) -> None:
        super().__init__()
        self.name = name
        self.attached = True
        self.hold = hold
        self.seen: Any = None
        self._place = [(owner, name.rpartition(".")[2], weight)]  # in a list, so that nothing is registered a second time
        self._home: list[tuple[nn.Module, str]] = []  # likewise
        self.selection = selection
        self._host_offsets = selection.row_offsets
        self.distinct, self.columns = _numbered(selection)
        if isinstance(weight, FakeTensor) and is_simulated(weight):
            if not is_simulated(selection.columns):
                self._move(weight.fake_mode.from_tensor)
        else:
            self._move(lambda index: sent(index, weight.device))
        # Where the rows of an attention's three projections begin, known before a compiler asks; where any others do, kept
        # where the host need not wait for it.
        rows = self.layout.shape[0]
        self._begins: dict[int, int] = {}
        if not is_simulated(selection.row_offsets):
            thirds = [0, rows // 3, 2 * (rows // 3), rows]
            self._begins = dict(zip(thirds, selection.row_offsets[thirds].tolist(), strict=True))
        held = self._held().float()
        self.agreed = held.clone()
        self.values = self._as_parameter(held)
        self._link()

    def _link(self) -> None:
        LIVING.add(self)
        self.__dict__["own"] = self.values  # not a second parameter
        self.values.selected_entries = self  # type: ignore[attr-defined]
        if self._place:
            scopes = () if self.seen is None else self.seen.scopes
            self.seen = self._look()
            self.seen.scopes = scopes
        self.alone = Agreement([self])

    def _as_parameter(self, held: Tensor) -> nn.Parameter:
        return nn.Parameter(held)

    def _look(self) -> Seen:
        return Seen(self, self.values, self._place[0][2])

    @property
    def here(self) -> WeightSelection:
        """The entries that this process steps: all, but of sharded models."""
        return self.selection

    @property
    def weight(self) -> nn.Parameter:
        """The weight in the model.

        Raises:
            ValueError: the tuner is detached.
        """
        if not self._place:
            raise ValueError(f"the tuner of {self.name} is detached")
        return self._place[0][2]

    @property
    def owner(self) -> nn.Module:
        """The module that has the weight."""
        return self._place[0][0]

    def check_place(self) -> None:
        """Refuse to go on where the model has another weight or other values by now.

        Raises:
            ValueError: the tuner is detached, or one of both was replaced.
        """
        weight = self.weight
        owner, leaf, _ = self._place[0]
        there = owner._parameters.get(leaf)
        if there is not weight and not self._stands_in(there):
            raise ValueError(
                f"{self.name} was replaced since attach(){_by_whom(there)}: its selected values reach no weight. Attach "
                "again, after whatever replaces parameters"
            )
        if (values := self._parameters.get("values")) is not self.own:
            raise ValueError(
                f"the selected values of {self.name} were replaced since attach(){_by_whom(values)}: attach again, after "
                "whatever replaces parameters"
            )

    def _stands_in(self, found: Any) -> bool:
        """Whether something else may be in the place of the weight."""
        return False

    def live_in(self, host: nn.Module, name: str) -> None:
        """Become a child of a module: the one that owns the weight, if that can have any."""
        host.add_module(name, self)
        self._home.append((host, name))

    def release(self) -> nn.Parameter:
        """Leave the module that owns the weight, and let go of both."""
        _, _, weight = self._place.pop()
        self.attached = False
        self.alone.forget()
        host, name = self._home.pop()
        host._modules.pop(name, None)
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
            self._begins[row] = int(self._host_offsets[row])
        return self._begins[row]

    def slice_of(self, rows: tuple[int, int]) -> slice:
        """Which entries lie in a half-open range of rows."""
        return slice(self.begin_of(rows[0]), self.begin_of(rows[1]))

    def row_offsets_of(self, rows: tuple[int, int]) -> Tensor:
        """``row_offsets`` of a half-open range of rows, counted from its first entry."""
        return self.row_offsets[rows[0] : rows[1] + 1] - self.begin_of(rows[0])

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        shared = self.columns is self.selection.columns
        self.selection = WeightSelection.trusted(self.layout, fn(self.row_offsets), fn(self.selection.columns))
        self.columns = self.selection.columns if shared else fn(self.columns)
        self.distinct = None if self.distinct is None else fn(self.distinct)
        note_on_host(self.row_offsets, self._host_offsets)

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight's memory as a matrix, with the CSR of the entries there."""
        with torch._C.DisableTorchFunctionSubclass():
            view, columns = self.selection.in_memory(self.weight)
        return view, self.row_offsets, columns

    def _held(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.selection.of(self.weight)

    @property
    def tuner(self) -> Any:
        """The tuner that the weight was attached by; ``None`` in a copy of a part of its model."""
        if self.seen is None:
            return None
        return next((scope.tuner for scope in self.seen.scopes if scope.tuner is not None), None)

    def settle(self) -> None:
        """Let the weight and the values agree again, after whatever changed one of them; if both, the values count."""
        if self.attached:
            self.alone.settle()

    def check_devices(self) -> None:
        """Refuse values that were moved away from their weight."""
        if self.seen.numbers.device != self.seen.stored.device:
            raise ValueError(
                f"{self.name} is on {self.seen.stored.device}, its selected values are on {self.own.device}: move the whole "
                "model with model.to(device)"
            )

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the weight, whatever it holds; every other entry keeps its bits."""
        self.check_place()
        self.check_devices()
        numbers = self.seen.numbers.detach()
        ops.scatter_values_(*self.memory(), numbers)
        self.agreed.copy_(numbers)
        self.alone.settle()

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Take over values ``[nnz]`` and write them into the weight, also where that has changed meanwhile."""
        self.seen.numbers.copy_(values)
        self.write_back()

    @torch.no_grad()
    def read_back(self) -> None:
        """Take over what the weight holds, whatever the values are, but where it is one of them, rounded."""
        held, numbers = self._held(), self.seen.numbers
        numbers.copy_(torch.where(held == numbers.to(held.dtype), numbers, held.float()))
        self.agreed.copy_(numbers)
        self.alone.settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.settle()
        for agreement in (self.alone, *(scope.agreement for scope in self.seen.scopes)):
            agreement.forget()  # so that the memory that is left behind is free at once
        # Moving to another device moves everything, but `.to(bfloat16)` leaves the values float32, and what allocates
        # without copying (`to_empty`) must not touch indices that kernels trust.
        super()._apply(lambda values: values.to(fn(values).device), recurse)  # type: ignore[no-untyped-call]
        device = self.values.device
        self._move(lambda index: sent(index, device))
        self.agreed = self.agreed.to(device)
        self._link()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.settle()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.read_back()  # a module loads before its children: the weight holds what was loaded

    # Scopes that are copied as well link themselves again.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "alone": None, "seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # copy.deepcopy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.values.is_inference():  # copied under torch.inference_mode(), and to be tuned nevertheless
            with torch.inference_mode(False):
                self.values = nn.Parameter(self.values.clone(), self.values.requires_grad)
                self.agreed = self.agreed.clone()
        self._link()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.selection.nnz} of {self.layout.shape[0] * self.layout.shape[1]} entries of {self.name}"


def settle(model: nn.Module) -> None:
    """Let all attached weights of a model agree with their values, whoever's tuner they are of."""
    for module in model.modules():
        if isinstance(module, SelectedEntries):
            module.settle()


def entries_of(parameter: Tensor) -> SelectedEntries | None:
    """The entries whose values a parameter is, if it is such a parameter."""
    return getattr(parameter, "selected_entries", None)


def _by_whom(found: Any) -> str:
    """What stands in place of a parameter, where its class says who put it there."""
    return "" if found is None or type(found) is nn.Parameter else f" by a {type(found).__name__}"


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
