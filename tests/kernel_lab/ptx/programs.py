"""Small kernels written in PTX by hand, and their launches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_lab.ptx.allocations import GlobalMemory
from kernel_lab.ptx.decoding import decode
from kernel_lab.ptx.findings import Findings
from kernel_lab.ptx.machine import Launched, execute
from kernel_lab.ptx.operands import Array
from kernel_lab.ptx.watching import register_exactly

HEADER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<20>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
"""  # %r1: thread, %r2: program, %rd4 and %rd5: where the thread's number is in the first and second tensor


@dataclass(frozen=True)
class Ran:
    """What a launch did and what was found."""

    launched: Launched
    findings: Findings

    @property
    def kinds(self) -> list[str]:
        return self.findings.kinds()


def launch(
    body: str,
    *tensors: Tensor,
    programs: int = 1,
    warps: int = 1,
    shared: int = 1024,
    order: Sequence[int] | Array | None = None,
    at_once: int | None = None,
    written: bool = True,
) -> Ran:
    """Executes a kernel of these lines on one or two tensors; ``written``: whether their memory counts as such."""
    memory, findings = GlobalMemory(), Findings()
    for number, tensor in enumerate(tensors):
        allocation = register_exactly(memory, tensor, f"tensor {number}")
        if not written:
            allocation.initialised = torch.zeros(allocation.size, dtype=torch.bool).numpy()
    addresses = [tensor.data_ptr() for tensor in tensors]
    addresses += [0] * (2 - len(addresses))
    code = decode(f"{HEADER}{body}\n\tret;\n}}\n")
    ordered = None if order is None else torch.tensor(list(order)).numpy()
    launched = execute(code, (programs, 1, 1), addresses, memory, findings, shared, warps, ordered, at_once)
    return Ran(launched, findings)


def numbers(count: int = 32, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(count, dtype=dtype)
