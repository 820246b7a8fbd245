"""No function of the Triton backend lets the host wait for the GPU, the first time or later."""

import pytest
import torch

from fps_kernels.ops import Csr
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from tests.support.pretended_gpu import pretended_gpu

CONVOLUTION = Convolution((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)


def there(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def csr(rows, nnz):
    return there(rows + 1, dtype=torch.int32), there(nnz, dtype=torch.int32)


def adamw(count=3, dtype=torch.bfloat16):
    one = there(64, 32, dtype=dtype), there(40), *csr(64, 40), there(40), there(40), there(40), there(), there(40)
    return AdamWTensors(*([part.clone() for _ in range(count)] for part in one))


def options(lrs, *scaling):
    return AdamWOptions(lrs, [0.1] * 3, 0.9, 0.999, 1e-8, False, *(scaling or (None, None)), False)


def agreement():
    return Agreement(*([part.clone() for _ in range(3)] for part in (there(64, 32), *csr(64, 40), there(40), there(40))))


def prepared_steps():
    tensors = adamw()
    step = backend.PreparedAdamW(tensors)
    for number in range(4):  # numbers and gradients that change, and that stay
        grads = [grad.clone() for grad in tensors.grads] if number == 2 else tensors.grads
        step.run(grads, options([0.1 / (1 + number // 2)] * 3))
        step.run(grads, options(there(3, dtype=torch.float64), there(), there()))


def prepared_agreement():
    prepared = backend.PreparedAgreement(agreement())
    prepared.run()
    prepared.run_one(1)


CALLS = {
    "column_norm_": lambda: backend.column_norm_(there(300, 32), there(32, dtype=torch.float64), 1.0),
    "column_norm_conv2d_": lambda: backend.column_norm_conv2d_(
        there(4, 3, 8, 8), there(1, 27, dtype=torch.float64), CONVOLUTION, 2.0
    ),
    "score_topk": lambda: backend.score_topk(there(64, 32), there(1, 32), 3),
    "score_kth": lambda: backend.score_kth([there(64, 32), there(8, 16)], [there(1, 32), there(1, 16)], 20),
    "score_counts": lambda: backend.score_counts([there(64, 32), there(8, 16)], [there(1, 32), there(1, 16)], there(2)),
    "score_select": lambda: backend.score_select(there(64, 32), there(1, 32), there(), 20),
    "sampled_grad": lambda: backend.sampled_grad(there(3000, 64), there(3000, 32), *csr(64, 100)),
    "linear_gradients": lambda: backend.linear_gradients(
        there(4, 50, 64), there(4, 50, 32), Csr(*csr(64, 2000)), True, None
    ),
    "sampled_grad_conv2d": lambda: backend.sampled_grad_conv2d(
        there(4, 8, 8, 8), there(4, 3, 8, 8), *csr(8, 30), CONVOLUTION
    ),
    "sparse_delta_matmul_": lambda: backend.sparse_delta_matmul_(
        there(300, 64), there(300, 32), *csr(64, 100), there(100), None
    ),
    "scatter_values_": lambda: backend.scatter_values_(there(64, 32), *csr(64, 40), there(40)),
    "masked_adamw_": lambda: backend.masked_adamw_(adamw(), options(there(3, dtype=torch.float64))),
    "agree_values_": lambda: backend.agree_values_(agreement()),
    "pack_groups": lambda: backend.pack_groups(there(5000), 8, None),
    "pack_groups, strided and stochastic": lambda: backend.pack_groups(there(50, 96)[:, :64], 4, 2**32 - 1),
    "unpack_groups": lambda: backend.unpack_groups(
        there(5000, dtype=torch.uint8), there(157, 2, dtype=torch.bfloat16), there(5000), 8
    ),
    "PreparedAdamW": prepared_steps,
    "PreparedAgreement": prepared_agreement,
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits(name):
    with pretended_gpu() as gpu, gpu.waiting(0):
        for _ in range(2):
            gpu.driver.launches.clear()
            CALLS[name]()
            assert gpu.launches


def test_every_function_of_the_backend_is_called():
    missing = {name for name in backend.__all__ if name not in CALLS}
    assert not missing
