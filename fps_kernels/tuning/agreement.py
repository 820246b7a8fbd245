"""Values and weights agree by what they hold: whoever changes one of them, however, is followed by the other.

Version counters would miss what is written through ``.data``, which weight averaging, sharpness-aware steps, merging of
adapters and sharded optimizers do. Hence what both agreed on last is kept, and one call compares all three
(:func:`fps_kernels.ops.agree_values_`): of a side that differs from it the other takes over what it holds, and the values
count where both do.
"""

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fps_kernels import ops
from fps_kernels.keeping.kept import Keeping
from fps_kernels.weights.matrix import is_simulated

if TYPE_CHECKING:
    from fps_kernels.tuning.compact_values import SelectedEntries

_CALL = nn.Module._call_impl.__name__
_SCOPE = "_selected_entries_scope"
_overrides_off = torch._C.DisableTorchFunctionSubclass
_is_transformed = torch._C._are_functorch_transforms_active
_in_backward = torch._C._current_graph_task_id


class Seen:
    """What a multiplication asks of an attached weight, in one place, which costs less than the modules that it is from; and
    what told of both sides, without looking at numbers, when they agreed last.

    Attributes:
        entries: the chosen entries.
        parameters: of ``entries``: where its values are, or what a functional call has put there for a while.
        own: the parameter that is there otherwise.
        values: the values, as autograd is given them: ``own``, but for sharded models.
        numbers: the values, as they lie here: likewise.
        weight: the weight that is multiplied by.
        stored: the weight, as it lies here: the same, but for sharded models.
        scopes: the forward passes at whose begin both agree.
        distinct: the columns that carry entries, or ``None``.
        whole: the entries in the columns of the weight.
        part: the entries in the columns among ``distinct``.
    """

    __slots__ = (
        "distinct",
        "entries",
        "numbers",
        "own",
        "parameters",
        "part",
        "scopes",
        "stored",
        "values",
        "values_address",
        "values_version",
        "weight",
        "weight_address",
        "weight_version",
        "whole",
    )

    numbers: Tensor
    stored: Tensor
    values: Tensor

    def __init__(self, entries: "SelectedEntries", values: nn.Parameter, weight: nn.Parameter) -> None:
        self.entries = entries
        self.own = self.values = self.numbers = values
        self.weight = self.stored = weight
        self.parameters = entries._parameters
        self.scopes: tuple[Scope, ...] = ()
        self.distinct = entries.distinct
        self.whole = ops.Csr(entries.row_offsets, entries.selection.columns)
        shared = entries.columns is entries.selection.columns
        self.part = self.whole if shared else ops.Csr(entries.row_offsets, entries.columns)
        self.values_version = self.weight_version = self.values_address = self.weight_address = -1

    def note(self) -> None:
        """Both sides agree as they are now, and lie where they did. Overrides have to be off."""
        self.values_version, self.weight_version = self.numbers._version, self.stored._version

    def moved(self) -> bool:
        """Whether either side has changed or lies elsewhere, as far as torch can tell. Overrides have to be off."""
        return (
            self.numbers._version != self.values_version
            or self.stored._version != self.weight_version
            or self.numbers.data_ptr() != self.values_address
            or self.stored.data_ptr() != self.weight_address
        )


class Agreement:
    """Lets the values of some weights and these weights agree, in one call for each device.

    The call is prepared once, and again where memory has moved. Until it is noticed that it has, the old memory is kept.
    """

    def __init__(self, entries: "list[SelectedEntries]") -> None:
        self.entries = entries
        self._sharded: list[Any] = [e for e in entries if e.is_sharded]
        self._ready = False
        self._calls: list[ops.PreparedAgreement] = []
        self._places: list[tuple[Seen, int, int]] = []

    def __getstate__(self) -> dict[str, Any]:  # a copy of it is of other memory
        return {"entries": self.entries, "_sharded": [], "_ready": False, "_calls": [], "_places": []}

    def forget(self) -> None:
        """Let go of the memory: it is about to move."""
        self._ready, self._calls, self._places = False, [], []

    def settle(self) -> None:
        """Let all agree.

        Raises:
            ValueError: values on another device than their weight.
        """
        if _is_transformed():  # weights and values themselves are not
            with torch._C._DisableFuncTorch():
                return self._settle()
        return self._settle()

    def _settle(self) -> None:
        with _overrides_off():
            written = self._look()
            if written is None:
                self._prepare()
                written = self._look()
            for call in self._calls:
                call.run()
            if written:
                # So that a backward pass that needs what was before notices. What was never seen is not known to differ.
                touched = [t for seen in written if seen.values_version >= 0 for t in (seen.numbers, seen.stored)]
                note_written(touched, written)

    def _look(self) -> list[Seen] | None:
        """What has changed, as far as torch can tell; ``None`` where the call is not of this memory."""
        changed = []
        if self._sharded and sum(e.follow_shard() for e in self._sharded):
            return None
        for seen, values_address, weight_address in self._places:
            values, weight = seen.numbers, seen.stored
            if values.data_ptr() != values_address or weight.data_ptr() != weight_address:
                return None
            if values._version != seen.values_version or weight._version != seen.weight_version:
                changed.append(seen)
        return changed if self._ready else None

    def _prepare(self) -> None:
        self.forget()
        places: list[tuple[Seen, int, int]] = []
        devices: dict[torch.device, list[SelectedEntries]] = {}
        for e in self.entries:
            e.hold(e)
            values, weight = e.seen.numbers, e.seen.stored
            if is_simulated(values):
                continue
            e.check_devices()
            if values.is_meta:
                continue  # no numbers that could differ
            devices.setdefault(values.device, []).append(e)
            e.seen.values_address, e.seen.weight_address = values.data_ptr(), weight.data_ptr()
            places.append((e.seen, e.seen.values_address, e.seen.weight_address))
        self._calls = [_call(found) for found in devices.values()]
        self._ready, self._places = True, places


def _call(entries: "list[SelectedEntries]") -> ops.PreparedAgreement:
    views, offsets, columns = zip(*(e.memory() for e in entries), strict=True)
    values = [e.seen.numbers.detach() for e in entries]
    return ops.prepared_agreement(views, offsets, columns, values, [e.agreed for e in entries])


def note_written(touched: Sequence[Tensor], agreeing: Sequence[Seen]) -> None:
    """Note what a kernel has changed behind autograd's back, and whose two sides agree now. Overrides have to be off."""
    torch.autograd.graph.increment_version(touched)
    for seen in agreeing:
        seen.note()


# ------------------------------------------------------------------------------------------------ forward passes


class Scope:
    """The forward pass of a module: at its begin all weights in it agree with their values, and need no look any more.

    Attributes:
        agreement: of the weights in the module.
        thread: the thread whose pass is under way, 0 for none.
        depth: calls of the module by itself that are under way.
        inner: scopes of modules inside, once somebody calls these without the module itself.
        outer: the scope that this one is inside of.
        tuner: of the model whose pass it is, ``None`` for an inner scope.
        kind: the class of the module, which ``fully_shard`` changes.
        keeping: how its passes keep what backward needs, ``None`` for as torch does.
    """

    def __init__(self, module: nn.Module, entries: "list[SelectedEntries]", keeping: Keeping | None = None) -> None:
        self.agreement = Agreement(entries)
        self.thread = self.depth = 0
        self.inner: list[Scope] = []
        self.outer: Scope | None = None
        self.tuner: Any = None
        self._module = module
        self.kind = type(module)
        self.keeping = keeping
        # Functions, which find the scope in the module: a copy of it finds its own.
        # Of sharded models before anything is gathered.
        first = any(e.is_sharded for e in entries)
        self._hooks = (
            module.register_forward_pre_hook(_begin, prepend=first),
            module.register_forward_hook(_end, always_call=True),
        )
        module.__dict__[_SCOPE] = self
        self._link()

    def _link(self) -> None:
        for e in self.agreement.entries:
            e.seen.scopes = (*e.seen.scopes, self)
        for scope in self.inner:
            scope.outer = self

    def open_inner(self) -> None:
        """Look at the passes of the module's children as well: somebody calls these, and not the module itself."""
        for child in self._module.children():
            within = {*child.modules()} - {child}
            inside = [e for e in self.agreement.entries if e in within]
            if inside and scope_of(child) is None:
                scope = Scope(child, inside, self.keeping)
                scope.outer = self
                self.inner.append(scope)

    # A copied module copies what it has: its entries and scope, but not the model around it, nor a pass that is under way.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "thread": 0, "depth": 0, "outer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._link()

    def was_interrupted(self, called: nn.Module | None) -> bool:
        """Whether the pass that seems to be under way is over: an interrupt by the user ends one without its hooks.

        If so, it is ended now.

        Args:
            called: the module whose call has just begun, if one has.
        """
        if self.thread != threading.get_ident():
            return False
        calls = 1 if self._module is called else 0
        if _calls_under_way(self._module) > calls:
            return False
        self.thread = self.depth = 0
        if self.keeping is not None:
            self.keeping.abandon()
        return True

    def remove(self) -> None:
        """Leave the module, and those inside."""
        if self.thread:
            self.was_interrupted(None)
        for scope in self.inner:
            scope.remove()
        for hook in self._hooks:
            hook.remove()
        self._module.__dict__.pop(_SCOPE, None)


def scope_of(module: nn.Module) -> Scope | None:
    """The scope of a module's forward pass, if it has one."""
    scope: Scope | None = module.__dict__.get(_SCOPE)
    return scope


def _calls_under_way(module: nn.Module) -> int:
    """How often this thread is in a call of ``module``."""
    found = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == _CALL and frame.f_locals.get("self") is module:
            found += 1
        frame = frame.f_back
    return found


def _begin(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    scope: Scope | None = module.__dict__.get(_SCOPE)
    if scope is None:
        return
    if module.__dict__.get("_is_replica"):
        raise RuntimeError(
            "an attached model cannot be replicated by DataParallel: its replicas would not be tuned. Use "
            "DistributedDataParallel, one process for each device"
        )
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record an attached model: detach its tuner first (tuner.detach() leaves the tuned "
            "weights in a plain model)"
        )
    for around in (scope, scope.outer):
        if around is not None and around.thread and not around.was_interrupted(module):
            if around is scope and scope.thread == threading.get_ident():
                scope.depth += 1
            return
    if type(module) is not scope.kind and scope.tuner is not None:
        scope.tuner.check_places()  # before a pass that would train nothing
        scope.kind = type(module)
    if _in_backward() < 0:  # what is computed again has to be what was computed
        scope.agreement.settle()
        if scope.tuner is not None:
            scope.tuner.compare_under_ddp()
    scope.thread = threading.get_ident()
    if scope.keeping is not None:
        scope.keeping.__enter__()


def _end(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    scope: Scope | None = module.__dict__.get(_SCOPE)
    if scope is not None and scope.thread == threading.get_ident():
        if scope.depth:
            scope.depth -= 1
            return
        scope.thread = 0
        if scope.keeping is not None:
            scope.keeping.__exit__(None, None, None)
