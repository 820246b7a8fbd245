"""Compiles the kernels ahead of time, without a GPU, exactly as the ops would launch them, and reads what they need.

:func:`record` runs an op on tensors without memory (``device="meta"``) and notes every launch that it would make on a GPU;
:func:`resources` compiles it for that GPU, which need not be there. Shared by ``tests/ops/test_triton_compile.py`` and
``benchmarks/triton_report.py``. Works only in a process that does not interpret Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fps_kernels.ops.triton import (
    agreement,
    column_norm,
    column_norm_conv2d,
    counts,
    gradients,
    gradients_conv2d,
    packing,
    sparse_deltas,
    splits,
    threshold,
    topk,
    updates,
)
from fps_kernels.ops.triton.target import assume

FAMILIES = (
    column_norm,
    column_norm_conv2d,
    topk,
    threshold,
    counts,
    gradients,
    gradients_conv2d,
    splits,
    sparse_deltas,
    updates,
    agreement,
    packing,
)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may ask for.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with its arguments specialised as Triton's launcher does.

    Attributes:
        target: one of :data:`TARGETS`.
        kernel: the jit function.
        grid: programs in each dimension.
        num_warps: warps per program.
        options: further options of the compiler, such as ``num_stages``.
        signature: the type of each parameter, ``"constexpr"`` where its value is compiled in.
        constants: the values that are compiled in.
        divisible: the parameters that are known to be divisible by 16.
    """

    target: str
    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    options: tuple[tuple[str, int], ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name

    @property
    def programs(self) -> int:
        programs = 1
        for n in self.grid:
            programs *= n
        return programs


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Attributes:
        registers: per thread.
        stack: bytes of stack (private segment) per thread.
        spilled: bytes of stack per thread that hold what did not fit into registers, or on AMD the number of such registers.
        shared: bytes of shared memory that it asks for.
        threads: threads per program.
        wide_loads: 16-byte loads from global memory in its code, into registers or (copied asynchronously) shared memory.
        reorderings: reshapes that Triton allowed to put the elements into another order, each into its own.
        assembly: PTX, or GCN assembly.
    """

    registers: int
    stack: int
    spilled: int
    shared: int
    threads: int
    wide_loads: int
    reorderings: int
    assembly: str


def record(target: str, op: Callable[..., object], *arguments: Any) -> list[Launch]:
    """The launches that a call would make, without making them.

    Args:
        target: one of :data:`TARGETS`.
        op: a function of this backend.
        arguments: as for the op; tensors on the ``meta`` device, whose address 0 counts as aligned.
    """
    launches: list[Launch] = []
    with recording(target, launches), assume(target):
        op(*arguments)
    return launches


@contextmanager
def recording(target: str, launches: list[Launch]) -> Iterator[None]:
    """Let ops of the Triton backend append their launches to a list, in place of making them."""

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return partial(self.launch, grid)

        def launch(self, grid: tuple[int, ...], *positional: Any, **named: Any) -> None:
            launches.append(specialised(target, self.kernel, grid, positional, named))

    kernels = [
        (family, name, value)
        for family in FAMILIES
        for name, value in vars(family).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for family, name, kernel in kernels:
        setattr(family, name, Recorder(kernel))
    try:
        yield
    finally:
        for family, name, kernel in kernels:
            setattr(family, name, kernel)


def specialised(
    target: str, kernel: Any, grid: tuple[int, ...], positional: tuple[Any, ...], named: dict[str, Any]
) -> Launch:
    """The launch ``kernel[grid](*positional, **named)``, ``named`` with the compiler's options."""
    options = {name: named[name] for name in ("num_stages", "maxnreg", "enable_fp_fusion") if name in named}
    values = dict(zip(kernel.arg_names, positional, strict=False)) | named
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    return Launch(
        target,
        kernel,
        grid,
        named["num_warps"],
        tuple(options.items()),
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
    )


def resources(launch: Launch) -> Resources:
    """Compile the kernel of a launch, and read what one program of it takes."""
    return _resources(without_grid(launch))


def without_grid(launch: Launch) -> Launch:
    """The same for all grids: launches that are compiled alike are equal then."""
    return replace(launch, grid=())


@cache
def _resources(launch: Launch) -> Resources:
    return _read(compiled(launch), launch.target)


def compiled(launch: Launch) -> Any:
    """What Triton makes of the kernel of a launch."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, **dict(launch.options)}
    return triton.compile(source, target=TARGETS[launch.target], options=options)


def _read(compiled: Any, target: str) -> Resources:
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    shared = compiled.metadata.shared
    reorderings = compiled.asm["ttgir"].count("allow_reorder")
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
            if found is None:
                raise ValueError(f"no {name} in the compiled kernel")
            return int(found.group(1))

        return Resources(
            registers=field("vgpr_count"),
            stack=field("private_segment_fixed_size"),
            spilled=field("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers, not to memory
            shared=shared,
            threads=threads,
            wide_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
            reorderings=reorderings,
            assembly=assembly,
        )
    usage = _resource_usage(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    wanted = re.search(r"__local_depot\d+\[(\d+)\]", assembly)  # stack before registers are assigned; frames come by 8 bytes
    frame = -(-int(wanted.group(1)) // 8) * 8 if wanted else 0
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        spilled=usage["LOCAL"] + max(0, usage["STACK"] - frame),
        shared=shared,
        threads=threads,
        wide_loads=len(
            re.findall(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global.*, 0x10", assembly)
        ),
        reorderings=reorderings,
        assembly=assembly,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK``, ``SHARED``, ``LOCAL``, ... of a cubin with one kernel, read by NVIDIA's ``cuobjdump``."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # ships inside the wheel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", done.stdout)}
