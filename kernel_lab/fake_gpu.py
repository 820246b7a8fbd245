"""A GPU that is not there: kernels are compiled for it and launched into a list, and executed by whoever likes.

What the host does on the way to a GPU is then done on any machine, and can be counted and timed. Works only in a process
that does not interpret Triton, with the functions of the Triton backend called directly: tensors lie in the memory of the
CPU, where nothing reads or writes them unless the launches are executed (:mod:`kernel_lab.ptx.launches`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from fps_kernels.ops.triton.launching import forget_plans
from fps_kernels.ops.triton.target import assume
from kernel_lab.compilation import FAMILIES, SHARED_LIMITS, TARGETS

_DEVICE = 99  # Triton keeps compiled kernels by the number of their device: none that there is
_STREAM, _FUNCTION = 7, 11


@dataclass(frozen=True)
class FakeLaunch:
    """One launch.

    Attributes:
        name: of the kernel.
        grid: programs in each dimension.
        arguments: what the kernel was handed in order, constants included: addresses or tensors for pointers.
        kind: what the kernel was compiled for: types of parameters, constants, and what is divisible by 16.
        source: what was compiled, of Triton.
        metadata: what the compiler tells of it: shared memory, warps, ...
    """

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    kind: str
    source: Any = field(repr=False)
    metadata: Any = field(repr=False)

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments, with addresses for tensors."""
        return tuple(a.data_ptr() if hasattr(a, "data_ptr") else a for a in self.arguments)

    @property
    def parameters(self) -> list[tuple[str, Any]]:
        """Type and value of those that the compiled kernel has: the others are constants in it."""
        typed = zip(self.source.signature.values(), self.values, strict=True)
        return [(kind, value) for kind, value in typed if kind != "constexpr"]

    @property
    def ptx(self) -> str:
        """The code of the kernel that is launched."""
        kernels, *_ = self.source.fn.device_caches[_DEVICE]
        (compiled,) = (kernel for kernel in kernels.values() if kernel.metadata is self.metadata)
        text: str = compiled.asm["ptx"]
        return text


@dataclass
class FakeDriver:
    """As much of Triton's driver as compiling and launching needs, for an H100 or an A100."""

    target: str = "sm_90"
    execute: Callable[[FakeLaunch], None] | None = None
    launches: list[FakeLaunch] = field(default_factory=list)
    listening: bool = True  # or only called, where what a call costs is timed

    def __post_init__(self) -> None:
        shared = SHARED_LIMITS[self.target]
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, _FUNCTION, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": shared, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        assert device == _DEVICE
        return _STREAM

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        name, expected = source.fn.__name__, len(source.signature)
        kind = str((source.signature, source.constants, source.attrs))

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if not self.listening:
                return
            assert (stream, function) == (_STREAM, _FUNCTION)
            _packed, _metadata, enter, leave, *arguments = rest
            assert len(arguments) == expected
            for hook in (enter, leave):
                if hook is not None:
                    hook(_metadata)
            launched = FakeLaunch(name, (x, y, z), tuple(arguments), kind, source, metadata)
            self.launches.append(launched)
            if self.execute is not None:
                self.execute(launched)

        return launch


@contextmanager
def fake_gpu(target: str = "sm_90", execute: Callable[[FakeLaunch], None] | None = None) -> Iterator[FakeDriver]:
    """Kernels go to the driver that this gives, whose ``launches`` tell of them.

    Args:
        target: one of :data:`~kernel_lab.compilation.TARGETS`, of NVIDIA.
        execute: what is done with each launch besides.
    """
    fake = FakeDriver(target, execute)
    before = driver._active
    forget_plans()
    driver.set_active(fake)
    try:
        with assume(target):
            yield fake
    finally:
        forget_plans()
        for family in FAMILIES:
            for kernel in vars(family).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.pop(_DEVICE, None)
        driver._active = before
