"""The switch: hooks that autograd calls with each tensor that it keeps for the backward pass."""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fps_kernels.keeping.packed import Groups, Heads, Mask, Packed, Signs, changed_in_place
from fps_kernels.keeping.policy import Way, queries_and_keys, way_of
from fps_kernels.ops.packing import along_memory

_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
_overrides_off = torch._C.DisableTorchFunctionSubclass
_is_transformed = torch._C._are_functorch_transforms_active
_CHECKPOINT = "torch.utils.checkpoint"
_HEADS = 3  # queries, keys and values: what an attention keeps before its output


class _View:
    """A packed tensor as one node keeps it."""

    __slots__ = ("packed", "shape", "strides")

    def __init__(self, packed: Packed, shape: torch.Size, strides: tuple[int, ...] | None) -> None:
        self.packed, self.shape, self.strides = packed, shape, strides

    def tensor(self) -> Tensor:
        found = self.packed.tensor()
        return found if self.strides is None else found.as_strided(self.shape, self.strides)


class _Whole:
    """A tensor that is kept as it is, and what torch itself would ask when it is needed."""

    __slots__ = ("back", "kept", "version")

    def __init__(self, t: Tensor, outer: "tuple[Any, Any] | None") -> None:
        t = t.detach()  # an output that keeps itself would never be freed
        self.version = t._version
        self.kept: Any = t if outer is None else outer[0](t)
        self.back: Any = None if outer is None else outer[1]

    def tensor(self) -> Tensor:
        if self.back is not None:
            found: Tensor = self.back(self.kept)
            return found
        t: Tensor = self.kept
        changed = changed_in_place(t, self.version)
        if changed is not None:
            raise changed
        return t


class Pack:
    """The hook that packs, of one entered context.

    Attributes:
        outer: hooks that were there before, which get what is packed (offloading to a CPU).
    """

    def __init__(self, outer: "tuple[Any, Any] | None") -> None:
        self.outer = outer
        self._packed: dict[Any, tuple[StorageWeakRef, weakref.ref[Packed]]] = {}
        self._waiting: list[Heads] = []

    def __call__(self, t: Tensor) -> "_View | _Whole":
        with _overrides_off(), torch.no_grad():
            way = way_of(t)
            if way is Way.WHOLE:
                return _Whole(t, self.outer)
            kinds: dict[Way, Callable[..., Packed]] = {
                Way.MASK: Mask,
                Way.SIGNS: Signs,
                Way.HEADS: Heads,
                Way.GROUPS: Groups,
            }
            self._settle(queries_and_keys(t))
            t = t.detach()
            dense = is_dense(t)
            if way in (Way.MASK, Way.SIGNS) and not dense:
                t, dense = t.contiguous(), True
            packed = None if way is Way.SIGNS else self._find(t, dense)
            if packed is None:
                send, back = (None, None) if self.outer is None else self.outer
                packed = kinds[way](t, send, back)
                if way is not Way.SIGNS:  # which are of no use to anybody else
                    self._note(t, dense, packed)
                if isinstance(packed, Heads):
                    self._waiting.append(packed)
                    if len(self._waiting) > _HEADS:
                        self._waiting.pop(0).settle(False)
            return _View(packed, t.shape, t.stride() if dense else None)

    def _settle(self, attended: "list[Any]") -> None:
        """Those that the attention behind ``attended`` keeps are known."""
        if attended:
            views = [kept.packed for kept in attended if isinstance(kept, _View)]
            for heads in self._waiting:
                heads.settle(any(heads is packed for packed in views))
            self._waiting.clear()

    def close(self) -> None:
        """Nothing is to come that could tell more of those that wait."""
        for heads in self._waiting:
            heads.settle(False)
        self._waiting.clear()

    def has(self, t: Tensor) -> bool:
        """Whether these very numbers are kept already."""
        with _overrides_off():
            return self._find(t, is_dense(t)) is not None

    @staticmethod
    def _key(t: Tensor, dense: bool) -> Any:
        extent = t.numel() if dense else (t.shape, t.stride())
        return t.untyped_storage()._cdata, t.storage_offset(), t._version, t.dtype, extent

    def _find(self, t: Tensor, dense: bool) -> Packed | None:
        storage, packed = self._packed.get(self._key(t, dense), (None, None))
        # A storage that is gone may have left its place to another one.
        return None if storage is None or packed is None or storage.expired() else packed()

    def _note(self, t: Tensor, dense: bool, packed: Packed) -> None:
        key, known = self._key(t, dense), self._packed

        def forget(reference: object) -> None:
            if key in known and known[key][1] is reference:
                del known[key]

        known[key] = StorageWeakRef(t.untyped_storage()), weakref.ref(packed, forget)


class Unpack:
    """The hook that gives back, of one entered context."""

    def __init__(self, outer: "tuple[Any, Any] | None") -> None:
        self.outer = outer

    def __call__(self, kept: "_View | _Whole") -> Tensor:
        with torch.no_grad():
            return kept.tensor()


def is_dense(t: Tensor) -> bool:
    """Whether ``t`` is all of a piece of memory, whatever the order of its dimensions."""
    if t.is_contiguous():
        return True
    merged = along_memory(t)
    own = merged.untyped_storage()._cdata == t.untyped_storage()._cdata  # not copied together
    return merged.dim() == 1 and merged.stride(0) == 1 and own


class Keeping:
    """The context manager of :func:`kept`. It can be entered again, and inside of itself."""

    def __init__(self, bits: int = 8) -> None:
        if bits != 8:
            raise ValueError(f"bits must be 8, got {bits}: fewer cost accuracy, see docs/how-to/memory.md")
        self.bits = bits
        self._entered: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:  # a copied model is not in a forward pass
        return {"bits": self.bits, "_entered": []}

    def __enter__(self) -> None:
        hooks = None
        top = _hooks(False)
        # Within a checkpoint nothing is kept that is worth packing. Transforms of functions take no hooks.
        if not _is_transformed() and not (top is not None and _is_checkpoint(top)):
            outer = None
            if top is not None:
                outer = top[0].outer if isinstance(top[0], Pack) else (top[0], top[1])
            pack = Pack(outer)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, Unpack(outer)), pack
            hooks[0].__enter__()
        self._entered.append(hooks)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        hooks = self._entered.pop()
        if hooks is not None:
            hooks[0].__exit__(kind, error, trace)
            with torch.no_grad(), _overrides_off():
                hooks[1].close()

    def abandon(self) -> None:
        """Leave what was entered last and never left: hooks that came later stay."""
        hooks = self._entered.pop()
        if hooks is None:
            return
        later: list[tuple[Any, Any]] = []
        while (top := _hooks(False)) is not None:
            _pop_hooks()
            if top[0] is hooks[1]:
                break
            later.append((top[0], top[1]))
        for pair in reversed(later):
            _push_hooks(*pair)


def _is_checkpoint(hooks: Any) -> bool:
    return getattr(hooks[0], "__module__", None) == _CHECKPOINT


def kept(bits: int = 8) -> Keeping:
    """Inside, what autograd keeps of a forward pass for the backward pass is kept in 8 bits a number, with a minimum and a
    step for every 32 numbers: about 0.28 of float32's memory, 0.56 of bfloat16's.

    For any model: fully tuned, with LoRA, attached (where ``fps.attach(model, selection, keep_bits=8)`` does it for every
    forward pass of the model). Activations are kept in 8 bits, masks of dropout in one; parameters, integers, statistics,
    small tensors and what needs no gradient stay as they are (:mod:`fps_kernels.keeping.policy` has the table). A forward
    pass computes the same numbers as always. Gradients are those of the rounded activations.

    Only the forward pass has to be inside. Of nested hooks (``save_on_cpu``) those further out get the packed memory;
    inside of ``torch.utils.checkpoint`` and of transforms by ``torch.func`` nothing is packed.

    Args:
        bits: 8. Fewer cost accuracy.

    Raises:
        ValueError: another number of bits.

    Example:
        >>> with fps.kept():
        ...     loss = F.cross_entropy(model(x), y)
        >>> loss.backward()
    """
    return Keeping(bits)
