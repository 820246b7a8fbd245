"""Executes what the ops of the Triton backend launch on CPU tensors, by Triton's launcher or by ours.

The driver that is not there (:mod:`kernel_lab.fake_gpu`) is handed every launch with the kernel that was chosen for it and
the arguments that it would get on a GPU; here it is run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from kernel_lab.fake_gpu import FakeLaunch, fake_gpu
from kernel_lab.ptx.allocations import GlobalMemory
from kernel_lab.ptx.decoding import decode
from kernel_lab.ptx.findings import Findings
from kernel_lab.ptx.machine import Launched, execute
from kernel_lab.ptx.operands import Array
from kernel_lab.ptx.watching import register, watching

Order = Callable[[int], Array]  # of so many programs
Edit = Callable[[str, str], str]  # the name of a kernel and its PTX -> other PTX


@dataclass
class ExecutedGpu:
    """A GPU whose launches are executed here.

    Attributes:
        edit: changes the PTX of a kernel before it runs: how faults are planted.
        order: of the programs of a launch; by their number if ``None``.
        at_once: programs that run in lockstep; as many as the machine likes if ``None``.
        launched: what the launches did.
        repeated: of each launch, whether it had addresses where Triton's own launcher is given tensors.
    """

    edit: Edit | None = None
    order: Order | None = None
    at_once: int | None = None
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    findings: Findings = field(default_factory=Findings)
    launched: list[Launched] = field(default_factory=list)
    repeated: list[bool] = field(default_factory=list)

    def execute(self, launch: FakeLaunch) -> None:
        """One launch, in place in the memory of its tensors.

        Raises:
            NotImplementedError: the kernel needs what the machine does not have; the message says what.
        """
        metadata = launch.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{launch.name} needs scratch memory")
        tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() not in self.memory.allocations:
                register(self.memory, tensor, f"argument of {launch.name} {list(tensor.shape)}")
        ptx = launch.ptx if self.edit is None else self.edit(launch.name, launch.ptx)
        code = decode(ptx)
        arguments = [_bits(kind, value) for kind, value in launch.parameters]
        programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        self.repeated.append(not tensors)
        self.launched.append(
            execute(
                code,
                launch.grid,
                arguments + [0] * (len(code.program.parameters) - len(arguments)),  # of scratch memory, which it has none of
                self.memory,
                self.findings,
                metadata.shared,
                metadata.num_warps,
                None if self.order is None else self.order(programs),
                self.at_once,
            )
        )


def _bits(kind: str, value: object) -> int:
    if not isinstance(value, int):
        raise NotImplementedError(f"an argument of type {kind} that is {value!r}")
    return int(value)


@contextmanager
def executing(gpu: ExecutedGpu, target: str) -> Iterator[ExecutedGpu]:
    """Within it, what the Triton backend launches on CPU tensors is executed as on a GPU.

    Args:
        gpu: what executes.
        target: ``"sm_80"`` or ``"sm_90"``: for which kernels are compiled.

    Example:
        >>> with executing(ExecutedGpu(), "sm_90") as gpu:
        ...     columns = backend.score_topk(W, a, 4)
        >>> gpu.findings.problems()
        []
    """
    with fake_gpu(target, gpu.execute), watching(gpu.memory):
        yield gpu
