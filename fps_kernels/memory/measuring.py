"""Peak memory of live tensors: exact, on the CPU, on a GPU, or simulated for a model that fits nowhere here."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


@dataclass(frozen=True)
class MemoryReport(Generic[T]):
    """What :func:`measure` found, in bytes.

    Attributes:
        peak: most bytes of live tensors at any time, with everything that lived before.
        before: bytes that lived before: the tensors handed over as ``existing``, and those that the function used
            without creating them.
        result: what the function returned.
    """

    peak: int
    before: int
    result: T

    @property
    def added(self) -> int:
        """``peak - before``: most bytes that the function itself held."""
        return self.peak - self.before

    def __str__(self) -> str:
        return f"peak {format_bytes(self.peak)} ({format_bytes(self.before)} before, {format_bytes(self.added)} added)"


def format_bytes(count: float) -> str:
    """``count`` in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.3f} {unit}" if unit == "GiB" else f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations create, until each is freed.

    Attributes:
        before: bytes of what lived before.
        live: bytes of what lives now.
        peak: most bytes that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.before = self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # each tells when its storage is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device  # asked for as often as all operations together
        kwargs = kwargs or {}
        given = _given(args, kwargs)
        for tensor in given:
            self.existing(tensor)
        result = func(*args, **kwargs)
        for tensor in (*_given((result,), {}), *given):  # an operation may grow an argument in place
            for storage in _storages(tensor):
                self._track(storage)
        self.peak = max(self.peak, self.live)
        return result

    def existing(self, tensor: Tensor) -> None:
        """Count a tensor that this mode did not see being made: it has been there all along."""
        for storage in _storages(tensor):
            if storage._cdata not in self._sizes:
                self._track(storage)
                self.before += storage.nbytes()
                self.peak += storage.nbytes()

    def add(self, existing: Iterable[nn.Module | Tensor]) -> None:
        """Count everything that lives throughout."""
        for tensor in _tensors(existing):
            self.existing(tensor)

    def restart(self) -> int:
        """The peak up to now; from here on it is that of what follows."""
        peak, self.peak = self.peak, self.live
        return peak

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._ends[key] = weakref.ref(storage, partial(self._freed, key))
        self.live += size - (known or 0)
        self._sizes[key] = size

    def _freed(self, key: int, _: object) -> None:
        self.live -= self._sizes.pop(key)
        del self._ends[key]


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among what an operation takes or gives. Most operations take no more than tensors and numbers."""
    found = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | dict):
            found += [leaf for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor)]
    return found


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout == torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    else:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield (tensor.crow_indices() if rows else tensor.ccol_indices()).untyped_storage()
        yield (tensor.col_indices() if rows else tensor.row_indices()).untyped_storage()
        yield tensor.values().untyped_storage()


def _tensors(existing: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for item in existing:
        if isinstance(item, nn.Module):
            yield from item.parameters()
            yield from item.buffers()
            yield from (p.grad for p in item.parameters() if p.grad is not None)
        else:
            yield item


def measure(function: Callable[[], T], existing: Iterable[nn.Module | Tensor] = ()) -> MemoryReport[T]:
    """Run a function and find the peak bytes of live tensors.

    Counts the memory that tensors own, whoever made them: parameters, activations, gradients, what autograd keeps. It
    does not count what an allocator holds in reserve, nor scratch inside one operation. Exact and repeatable, on any
    device, and under :func:`simulated` without allocating anything.

    Args:
        function: what to run.
        existing: modules and tensors that live throughout, used or not.

    Returns:
        :class:`MemoryReport`.

    Example:
        >>> report = fps.memory.measure(lambda: fps.select(model, loader, micro_batch=2), existing=[model])
        >>> print(report)
        peak 378.2 MiB (366.7 MiB before, 11.5 MiB added)
    """
    live = LiveTensors()
    live.add(existing)
    with live:
        result = function()
    return MemoryReport(live.peak, live.before, result)


@contextmanager
def simulated() -> Iterator[Callable[[Callable[[], nn.Module]], nn.Module]]:
    """Inside, tensors have shapes but no memory, so that :func:`measure` tells what a model would need.

    Yields:
        A function that builds a model without memory: it takes what would build the real one.

    Example:
        >>> with fps.memory.simulated() as build:
        ...     model = build(lambda: timm.create_model("vit_huge_patch14_224"))
        ...     batch = torch.empty(64, 3, 224, 224)
        ...     report = fps.memory.measure(lambda: fps.select(model, [batch], micro_batch=2), existing=[model, batch])
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def build(create: Callable[[], nn.Module]) -> nn.Module:
        # Constructors compute with real numbers (drop-path rates, ...), so only parameters are left out at first.
        with unset_fake_temporarily(), torch.device("meta"):
            model = create()
        return placed(model)

    with mode:
        yield build


def placed(model: nn.Module) -> nn.Module:
    """A model from device "meta" as one on the CPU, inside of :func:`simulated`; what layers share, they still share."""
    known: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in known:
                    known[parameter] = nn.Parameter(_empty(parameter), parameter.requires_grad)
                module._parameters[name] = known[parameter]  # type: ignore[assignment]  # parameters give parameters
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = known.setdefault(buffer, _empty(buffer))
    return model


def _empty(like: Tensor) -> Tensor:
    # Of the size alone, which is quicker than of a tensor that the simulation does not know.
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")
