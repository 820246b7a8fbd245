"""The native library as a whole: which instruction set runs, and that it shares torch's OpenMP."""

from pathlib import Path

import pytest

from fps_kernels.ops import native
from tests.support.processes import run_python


@pytest.mark.parametrize("name", native.ISAS)
def test_environment_caps_the_instruction_set(name: str) -> None:
    code = "from fps_kernels.ops import native; print(native.isa())"
    result = run_python(code, FPS_CPU_ISA=name)
    best = native.supported_isas()[-1]
    assert result.stdout.strip() == min(name, best, key=native.ISAS.index), result.stderr


def test_environment_with_an_unknown_instruction_set_is_refused() -> None:
    code = (
        "import torch; from fps_kernels import ops\n"
        "try: ops.score_topk(torch.ones(2, 3), torch.ones(3), 1)\n"
        "except ValueError as error: print(error)"
    )
    result = run_python(code, FPS_CPU_ISA="sse9")
    assert "FPS_CPU_ISA must be one of base, avx2, avx512, got 'sse9'" in result.stdout, result.stderr


def test_use_isa_refuses_what_the_processor_lacks_and_restores() -> None:
    before = native.isa()
    with pytest.raises(ValueError, match="use_isa"), native.use_isa("sse9"):
        pass
    with native.use_isa("base"):
        assert native.isa() == "base"
    assert native.isa() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory map of Linux")
def test_torch_and_the_library_share_one_openmp() -> None:
    code = (
        "import torch\n"
        "from fps_kernels import ops\n"
        "ops.column_norm_(torch.ones(4096, 512), torch.zeros(512, dtype=torch.float64), 1.0)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({path for path in maps if 'libgomp' in path or 'libomp' in path or 'libiomp' in path}))"
    )
    result = run_python(code)
    assert result.stdout.strip() in ("0", "1"), result.stdout + result.stderr


def test_an_agreement_that_holds_writes_nothing() -> None:
    """Into memory that cannot be written to: a store of what is there already would end the process."""
    code = (
        "import mmap, tempfile, torch, warnings\n"
        "from fps_kernels.ops import native\n"
        "from fps_kernels.ops.records import Agreement\n"
        "warnings.simplefilter('ignore')  # torch.frombuffer: such memory cannot be written to\n"
        "def fixed(t):\n"
        "    file = tempfile.TemporaryFile()\n"
        "    file.write(t.contiguous().view(torch.uint8).numpy().tobytes()); file.flush()\n"
        "    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape)\n"
        "csr = torch.arange(0, 3001, 50).int(), torch.arange(0, 100, 2).int().repeat(60)\n"
        "for dtype in torch.float32, torch.bfloat16, torch.float16:\n"
        "    W = torch.randn(60, 100).to(dtype)\n"
        "    W[3, :8:2] = torch.tensor([float('nan'), -0.0, float('inf'), 1e-40])\n"
        "    values = W[:, ::2].flatten().float()\n"
        "    tensors = fixed(W), *csr, fixed(values), fixed(values)\n"
        "    for isa in native.supported_isas():\n"
        "        with native.use_isa(isa): native.agree_values_(Agreement(*([t] for t in tensors)))\n"
        "print('done')"
    )
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr
