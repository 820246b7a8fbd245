"""Compiles the kernels ahead of time, without a GPU, and reads what each of them needs from the machine code.

Shared by ``tests/ops/test_triton_compile.py`` and ``benchmarks/triton_report.py``. Works only in a process that does not
interpret Triton.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as the launch function would ask for it.

    Attributes:
        name: unique, for tables and test ids.
        kernel: the jit function.
        arguments: for each parameter its type, such as ``"*bf16"``, ``"i32"``, with ``:16`` behind it where Triton knows
            that 16 divides it; anything that is not a string is a compile-time constant.
        num_warps: warps of 32 threads (64 on AMD) per program.
        wide_loads: whether 16-byte loads from global memory are required.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int = 4
    wide_loads: bool = False


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Attributes:
        registers: per thread.
        stack: bytes of stack (private segment) per thread.
        spilled: bytes of local memory per thread, or on AMD the number of spilled vector registers.
        shared: bytes of shared memory.
        threads: threads per program.
        wide_loads: number of 16-byte loads from global memory in its code.
        assembly: PTX, or GCN assembly.
    """

    registers: int
    stack: int
    spilled: int
    shared: int
    threads: int
    wide_loads: int
    assembly: str


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile for one of :data:`TARGETS` and read the result.

    Raises:
        ValueError: the arguments are not those of the kernel.
    """
    return _read(_compile(variant, target), target)


def _compile(variant: Variant, target: str) -> Any:
    names = variant.kernel.arg_names
    if list(variant.arguments) != names:
        raise ValueError(f"{variant.name} must give the arguments {names}, got {list(variant.arguments)}")
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, (name, value) in enumerate(variant.arguments.items()):
        if isinstance(value, str):
            signature[name], _, divisor = value.partition(":")
            if divisor:
                attributes[(index,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": variant.num_warps})


def _read(compiled: Any, target: str) -> Resources:
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    shared = compiled.metadata.shared
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
            assembly=assembly,
        )
    usage = resource_usage(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        spilled=usage["LOCAL"],
        shared=max(shared, usage["SHARED"]),
        threads=threads,
        wide_loads=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", assembly)),
        assembly=assembly,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK``, ``SHARED``, ``LOCAL``, ... of a cubin with one kernel, read by NVIDIA's ``cuobjdump``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", text)}


@cache
def _cuobjdump() -> str:
    """The one that ships inside the Triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
