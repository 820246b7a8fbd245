"""A GPU that nobody has to have, and for which nobody may wait: a training step or a choice is run on tensors that are said
to lie there, and whatever would make the host wait for them is found.

Tensors of the device are fake (``FakeTensorMode``): shapes and devices, no numbers. Tensors of the host are real. So code
goes the way that it goes on a GPU, kernels are compiled and launched into a list (``kernel_lab.fake_gpu``), and what
the host wants to read of the device it cannot have: an operation that waits raises :class:`WaitError`, unless a number of
waits is allowed, of which each is answered with zeros.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_lab.fake_gpu import FakeDriver, fake_gpu

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

# The number of what these give is read by the host, or is the size of a tensor that they make.
READING = frozenset(
    (
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.is_nonzero.default,
        aten.item.default,
        aten.nonzero.default,
        aten.argwhere.default,
        aten.masked_select.default,
        aten._unique.default,
        aten._unique2.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.unique_dim_consecutive.default,
        aten.bincount.default,
    )
)
INDEXING = frozenset((aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_))
MUTATING_WITHOUT_FAKE = frozenset(("_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"))


_LOOKING_AT_CLASSES = frozenset(f"fps_kernels.{name}" for name in ("weights.matrix", "weights.survey", "tuning.attaching"))


class WaitError(AssertionError):
    """The host would have waited for the device."""


_SET_ITEM = Tensor.__setitem__


def on_device(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def why_it_waits(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What an operation on tensors of the device makes the host wait for, ``None`` where it does not."""
    packet = func.overloadpacket
    if func in READING:
        return "the host reads a number or a size from the device"
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "the size of the result is read from the device: give output_size"
    if packet in INDEXING:
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "an index by a mask has a size that is read from the device"
        if not all(map(on_device, indices)):
            return "an index of the host is copied to the device, which blocks"
    if packet in (aten._to_copy, aten.copy_):
        source = args[1] if packet is aten.copy_ else args[0]
        goal = args[0].fake_device if packet is aten.copy_ and isinstance(args[0], FakeTensor) else None
        if packet is aten._to_copy:
            goal = torch.device(kwargs.get("device") or getattr(source, "fake_device", source.device))
        goal = goal or torch.device("cpu")
        asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        if on_device(source) and goal.type == "cpu":
            return "a copy to the host"
        if not on_device(source) and goal.type == "cuda" and not asynchronous:
            return "a copy to the device that blocks: let it be non_blocking, from pinned memory"
    return None


class Watch(TorchDispatchMode):
    """Runs host tensors as they are and device tensors as fakes, and finds waits.

    Attributes:
        waits: what was waited for, and where, in order.
        allowed: how many waits there may be; ``None`` for any number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.allowed: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            # The engine of autograd, which asks, has a queue for each device that there is: it is told of one without.
            device = args[0].fake_device
            return torch.device("meta") if device.type == "cuda" else device
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = DEVICE
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not made_there and not any(map(on_device, leaves)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket.__name__ in MUTATING_WITHOUT_FAKE:
            return args[0] if func.overloadpacket.__name__.startswith("_amp_update") else None
        if (reason := why_it_waits(func, args, kwargs)) is not None:
            return self._wait(reason, func, args, kwargs)
        return func(*args, **kwargs)

    def _wait(self, reason: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.waits.append(f"{func}: {reason}, in {_our_line()}")
        if self.allowed is not None and len(self.waits) > self.allowed:
            raise WaitError(self.waits[-1] if self.allowed == 0 else "\n".join(self.waits))
        with unset_fake_temporarily():
            if func is aten._local_scalar_dense.default:
                return torch.zeros((), dtype=args[0].dtype).item()
            if func is aten.equal.default:
                return True
            if func.overloadpacket is aten._to_copy and on_device(args[0]):
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if func.overloadpacket is aten.copy_ and not on_device(args[0]):
                return args[0].zero_()
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            return func(*args, **kwargs)
        raise WaitError(self.waits[-1])  # its size would have to be made up

    def set_item(self, tensor: Tensor, index: Any, value: Any) -> None:
        """``tensor[index] = value``: torch copies a plain number that goes to one place, and that blocks."""
        if on_device(tensor) and not isinstance(value, Tensor):
            place = tensor.detach()[index]
            if place.dim() == 0:
                self._wait("a number is copied to the device", aten.copy_.default, (place, torch.tensor(value)), {})
                return
        _SET_ITEM(tensor, index, value)

    @contextmanager
    def allowing(self, number: int | None) -> Iterator[list[str]]:
        """Inside, so many waits are allowed (``None``: any number), of which it gives the list."""
        before = self.waits, self.allowed
        self.waits, self.allowed = [], number
        try:
            yield self.waits
        finally:
            self.waits, self.allowed = before


def _our_line() -> str:
    """The innermost line of the package, or of the test."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__]
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    innermost = (ours or frames)[-1]
    return f"{innermost.filename.removeprefix(f'{ROOT}/')}:{innermost.lineno}: {innermost.line}"


class PretendedGpu:
    """What :func:`pretended_gpu` gives.

    Attributes:
        watch: finds waits.
        driver: has the list of launches.
    """

    def __init__(self, watch: Watch, driver: FakeDriver) -> None:
        self.watch, self.driver = watch, driver

    def waiting(self, number: int | None) -> Any:
        """A context in which the host may wait so many times, ``None`` for as often as it likes; gives the list of waits."""
        return self.watch.allowing(number)

    @property
    def launches(self) -> list[str]:
        """Names of the kernels that were launched."""
        return [launch.name for launch in self.driver.launches]


class _Stream:
    cuda_stream = 7

    def record_event(self) -> Any:
        return SimpleNamespace()

    def wait_event(self, event: Any) -> None:
        pass


def _address(tensor: FakeTensor) -> int:
    """Where a fake tensor is said to lie: one place for each storage, aligned as an allocator would."""
    storage = tensor.untyped_storage()._cdata
    return (storage << 8) % 2**60 + tensor.storage_offset() * tensor.element_size()


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Inside, ``device="cuda"`` has tensors without numbers, kernels are launched into a list, and waits are found."""
    patch = pytest.MonkeyPatch()
    for name, module in list(sys.modules.items()):  # code is to take them for tensors of a GPU, but not for odd classes
        if name.startswith("fps_kernels") and hasattr(module, "is_simulated") and name not in _LOOKING_AT_CLASSES:
            patch.setattr(module, "is_simulated", lambda tensor: False)
    from fps_kernels.tuning import step_plan

    patch.setattr(step_plan, "_dispatch_modes", lambda: 0)
    patch.setattr(FakeTensor, "is_cuda", property(on_device))
    patch.setattr(FakeTensor, "is_cpu", property(lambda t: t.fake_device.type == "cpu"))
    patch.setattr(FakeTensor, "is_meta", property(lambda t: False))
    patch.setattr(FakeTensor, "get_device", lambda t: -1 if t.fake_device.type == "cpu" else 0)
    real_address = Tensor.data_ptr
    patch.setattr(Tensor, "data_ptr", lambda t: _address(t) if isinstance(t, FakeTensor) else real_address(t))
    patch.setattr(FakeTensor, "record_stream", lambda t, stream: None)
    patch.setattr(Tensor, "pin_memory", lambda t, device=None: t)
    for name, value in (
        ("current_device", lambda: 0),
        ("current_stream", lambda device=None: _Stream()),
        ("is_current_stream_capturing", lambda: False),
        ("_exchange_device", lambda index: 0),
        ("_maybe_exchange_device", lambda index: 0),
        ("device_of", lambda tensor: nullcontext()),
    ):
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: _Stream.cuda_stream, raising=False)
    patch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False, raising=False)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with ExitStack() as stack:
        stack.callback(patch.undo)
        driver = stack.enter_context(fake_gpu())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        watch = stack.enter_context(Watch())
        patch.setattr(
            FakeTensor, "__setitem__", lambda tensor, index, value: watch.set_item(tensor, index, value), raising=False
        )
        yield PretendedGpu(watch, driver)
