"""Launching a compiled kernel again.

Triton's own launcher binds every argument by name, looks at its dtype and alignment and makes a text of all that, by which
it finds the compiled kernel: 15 to 18 µs of Python a launch, as long as the kernels of a small layer run. What an op
launches follows from the shapes, strides, dtypes and alignments of its arguments. So an op notes by these what it launched
the first time, and hands it addresses the next time.
"""

import threading
from collections.abc import Hashable
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

MOST_PLANS = 4096  # of one op: who never sees the same shapes twice must not fill the memory with them

Grid = tuple[int, int, int]


class Compiled:
    """A kernel that was compiled for arguments of certain kinds, and is launched with others of the same kinds.

    The kinds: pointers to the same dtypes that are aligned to 16 bytes or not; integers that are 1 or not, divisible by 16
    or not, of 32 bits or more.
    """

    __slots__ = ("_constants", "_device", "_kernel")

    def __init__(self, kernel: Any, constants: tuple[Any, ...], device: int) -> None:
        self._kernel, self._constants, self._device = kernel, constants, device

    def launch(self, grid: Grid, *arguments: int | None) -> None:
        """On the current stream of the device it was compiled for.

        Args:
            grid: programs in each dimension.
            arguments: of the parameters that are not ``tl.constexpr``, in their order; addresses for pointers.
        """
        active = driver.active
        device = self._device
        if active.get_current_device() != device:
            with torch.cuda.device(device):
                return self.launch(grid, *arguments)
        stream = active.get_current_stream(device)
        kernel = self._kernel
        if _somebody_listens():
            kernel[grid](*arguments, *self._constants, stream=stream)
        else:
            metadata = kernel.packed_metadata
            kernel.run(*grid, stream, kernel.function, metadata, None, None, None, *arguments, *self._constants)
        return None


def _somebody_listens() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Compiled | None:
    """An ordinary launch, ``kernel[grid](*arguments, **options)``.

    Args:
        kernel: a jit function whose ``tl.constexpr`` parameters come last.
        grid: programs in each dimension.
        arguments: of its other parameters, in their order.
        options: of its ``tl.constexpr`` parameters, and of the compiler.

    Returns:
        What it was compiled to; ``None`` under the interpreter, which does not compile.
    """
    made = kernel[grid](*arguments, **options)
    if not isinstance(made, CompiledKernel):
        return None
    constants = tuple(options[parameter.name] for parameter in kernel.params if parameter.is_constexpr)
    return Compiled(made, constants, driver.active.get_current_device())


def alignment(addresses: tuple[int, ...]) -> tuple[bool, ...] | bool:
    """Which of them are aligned to 16 bytes; ``True`` if all are."""
    together = 0
    for address in addresses:
        together |= address
    return True if together & 15 == 0 else tuple(address & 15 == 0 for address in addresses)


class Plans:
    """What an op launches, by all that this depends on.

    Autograd runs backward passes in threads of its own. To find a plan takes no lock: one is put there whole, and who finds
    none works it out again, with the same result.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self.find = self._plans.get
        _all_plans.append(self)

    def note(self, key: Hashable, plan: Any) -> None:
        with self._lock:
            if len(self._plans) >= MOST_PLANS and key not in self._plans:
                self._plans.clear()
            self._plans[key] = plan

    def forget(self) -> None:
        with self._lock:
            self._plans.clear()


_all_plans: list[Plans] = []


def forget_plans() -> None:
    """Let every op work out again what it launches: for those who change what that follows from."""
    for plans in _all_plans:
        plans.forget()
