"""What the Triton backend launches, and that a launch which is repeated is the one that Triton's own launcher makes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton import knobs

from fps_kernels import ops
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from fps_kernels.ops.triton import gradients, launching
from kernel_lab.fake_gpu import FakeDriver, fake_gpu
from tests.support.entries import AdamWProblem, AgreementProblem

CPU = torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[FakeDriver]:
    with fake_gpu() as driver:
        yield driver


def names(gpu: FakeDriver, call: Callable[[], object]) -> list[str]:
    gpu.launches.clear()
    call()
    return [launch.name for launch in gpu.launches]


def linear(M: int, O: int, C: int, per_output: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    csr = torch.arange(0, O * per_output + 1, per_output).int(), torch.randint(0, C, (O * per_output,)).int()
    return torch.randn(M, O).to(dtype), torch.randn(M, C).to(dtype), *csr


def image(B: int, C: int, size: int) -> tuple[Tensor | Convolution, ...]:
    csr = torch.arange(9).int(), torch.randint(0, C * 9, (8,)).int()
    convolution = Convolution((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    return torch.randn(B, 8, size, size), torch.randn(B, C, size, size), *csr, convolution


def test_a_gradient_of_one_part_is_one_launch(gpu):
    for grad in (backend.sampled_grad, gradients.sampled_grad_with_bias):
        few, many = linear(20, 64, 32, 1), linear(20, 64, 32, 16)
        for _ in range(2):  # Triton's launcher, and ours
            assert names(gpu, lambda grad=grad, few=few: grad(*few)) == ["_gather"]
            assert names(gpu, lambda grad=grad, many=many: grad(*many)) == ["_product"]
    small = image(1, 3, 5)
    for _ in range(2):
        assert names(gpu, lambda: backend.sampled_grad_conv2d(*small)) == ["_gather_windows"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_pass_of_a_linear_map_is_one_launch(gpu, bias):
    """Of the shapes that layers have, with the addresses of this call, also where it is found before any reshaping."""
    gy, x, offsets, columns = linear(20, 64, 32, 16)
    csr = ops.Csr(offsets, columns)
    for _ in range(4):
        gy, x = torch.randn(4, 5, 64), torch.randn(4, 5, 32)
        assert names(gpu, lambda gy=gy, x=x: backend.linear_gradients(gy, x, csr, bias, None)) == ["_product"]
        (launched,) = gpu.launches
        assert {gy.data_ptr(), x.data_ptr(), *csr.addresses} <= set(launched.values)
    assert names(gpu, lambda: backend.linear_gradients(gy.mT.contiguous().mT, x, csr, bias, None)) == ["_product"]


def test_a_gradient_of_several_parts_is_two_launches(gpu):
    for grad in (backend.sampled_grad, gradients.sampled_grad_with_bias):
        few, many = linear(2000, 64, 32, 1), linear(2000, 64, 32, 16)
        for _ in range(2):
            assert names(gpu, lambda grad=grad, few=few: grad(*few)) == ["_gather", "_add_splits"]
            assert names(gpu, lambda grad=grad, many=many: grad(*many)) == ["_product", "_add_splits"]
    large = image(8, 3, 20)
    for _ in range(2):
        assert names(gpu, lambda: backend.sampled_grad_conv2d(*large)) == ["_gather_windows", "_add_splits"]


def adamw(weight_dtype: torch.dtype = torch.bfloat16) -> tuple[AdamWTensors, AdamWProblem]:
    problem = AdamWProblem(CPU, weight_dtype, None, True)
    csr = [offsets for offsets, _ in problem.csr], [columns for _, columns in problem.csr]
    state = problem.masters, problem.exp_avgs, problem.exp_avg_sqs, problem.steps
    return AdamWTensors(
        problem.weights, problem.gradients(), *csr, *state, [master.clone() for master in problem.masters]
    ), problem


def test_a_step_is_one_launch(gpu):
    tensors, _ = adamw()
    n = len(tensors.weights)
    numbers = [0.0] * n, 0.9, 0.999, 1e-8, False, None, None, False
    options = AdamWOptions(torch.zeros(n, dtype=torch.float64), *numbers)
    prepared = backend.PreparedAdamW(tensors)
    for _ in range(3):
        assert names(gpu, lambda: backend.masked_adamw_(tensors, options)) == ["_masked_adamw"]
        assert names(gpu, lambda: prepared.run(tensors.grads, AdamWOptions([0.1] * n, *numbers))) == ["_masked_adamw"]


def test_an_agreement_is_one_launch(gpu):
    agreement = Agreement(*AgreementProblem(CPU, torch.float16).arguments)
    prepared = backend.PreparedAgreement(agreement)
    assert names(gpu, lambda: backend.agree_values_(agreement)) == ["_agree_values"]
    for _ in range(2):
        assert names(gpu, prepared.run) == ["_agree_values"]
    programs = 0
    for i, columns in enumerate(agreement.columns):
        assert names(gpu, lambda i=i: prepared.run_one(i)) == ["_agree_values"] * (columns.numel() > 0)
        programs += sum(launch.grid[0] for launch in gpu.launches)
    prepared.run()
    assert gpu.launches[-1].grid == (programs, 1, 1)


def variants() -> dict[str, tuple[Tensor, ...]]:
    """Gradients that want kernels compiled for different kinds of arguments, or different numbers."""
    gy, x, row_offsets, columns = linear(70, 64, 32, 1)
    wide_x, wide_gy = torch.randn(70, 100), torch.randn(70, 100)
    entries = torch.randint(0, 32, (65,)).int()
    return {
        "plain": (gy, x, row_offsets, columns),
        "bfloat16": (gy.bfloat16(), x.bfloat16(), row_offsets, columns),
        "both": (gy, x.half(), row_offsets, columns),
        "x unaligned": (gy, wide_x[:, 1:33], row_offsets, columns),
        "x with other strides": (gy, wide_x[:, :32], row_offsets, columns),
        "gy unaligned": (wide_gy[:, 3:67], x, row_offsets, columns),
        "gy transposed": (gy.t().contiguous().t(), x, row_offsets, columns),
        "columns unaligned": (gy, x, row_offsets, entries[1:]),
        "fewer entries": (gy, x, row_offsets.clamp(max=50), columns[:50]),
        "one row": (gy[:1], x[:1], row_offsets, columns),
        "many rows": linear(300, 64, 32, 1),
        "many entries": linear(70, 64, 32, 16),
    }


def test_a_repeated_launch_is_that_of_triton(gpu):
    """The same kernel, the same programs, the same numbers and addresses, whatever was launched in between."""

    def launches(call):
        gpu.launches.clear()
        call()
        results = {"_add_splits": (0, 1)}  # what is allocated anew

        def told(launch):
            fresh = results.get(launch.name, (4,))
            return launch.name, launch.grid, launch.kind, [v for i, v in enumerate(launch.values) if i not in fresh]

        return [told(launch) for launch in gpu.launches]

    small = image(1, 3, 5), image(2, 3, 5), image(8, 3, 20)
    calls: list[Callable[[], object]] = [lambda a=a: backend.sampled_grad_conv2d(*a) for a in small]
    for arguments in variants().values():
        calls += [lambda a=arguments: backend.sampled_grad(*a), lambda a=arguments: gradients.sampled_grad_with_bias(*a)]
    ordinary = []
    for call in calls:
        launching.forget_plans()
        ordinary.append(launches(call))
    assert len({str(launch) for launch in ordinary}) == len(calls)
    for call in calls:
        call()
    for call, expected in zip(calls, ordinary, strict=True):
        assert launches(call) == expected


def test_a_repeated_step_is_that_of_triton(gpu):
    tensors, problem = adamw()
    n = len(tensors.weights)
    scale, one = torch.ones(4), torch.ones(())
    rates = torch.zeros(n + 1, dtype=torch.float64)
    prepared = backend.PreparedAdamW(tensors)
    for maximize, zero in ((False, False), (True, False), (False, True)):
        for grad_scale, found_inf in ((None, None), (one, None), (scale[1], one), (scale[1], scale[1])):
            for lrs in ([0.1] * n, rates[:n], rates[1:]):
                gpu.launches.clear()
                for _ in range(2):
                    numbers = [0.0] * n, 0.9, 0.999, 1e-8, maximize, grad_scale, found_inf, zero
                    prepared.run(tensors.grads, AdamWOptions(lrs, *numbers))
                first, second = gpu.launches
                assert (first.grid, first.kind) == (second.grid, second.kind)
                assert all(a == b for i, (a, b) in enumerate(zip(first.values, second.values, strict=True)) if i != 1)
    assert problem.weights[0].isfinite().all()


def test_profilers_hear_of_repeated_launches(gpu):
    heard = []
    arguments = linear(20, 64, 32, 1)
    backend.sampled_grad(*arguments)
    hook = knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        backend.sampled_grad(*arguments)
    finally:
        hook.remove(heard.append)
    assert len(heard) == 1
    assert heard[0].get()["name"] == "_gather"


def test_plans_do_not_pile_up(gpu, monkeypatch):
    monkeypatch.setattr(launching, "MOST_PLANS", 3)
    for M in range(1, 20):
        backend.sampled_grad(*linear(M, 16, 8, 1))
        assert len(gradients._plans._plans) <= 3


def test_the_interpreter_is_not_bypassed():
    assert not ops.interpreted()
    assert launching.launch({(1,): lambda *arguments, **options: None}, (1,), 5, BLOCK=4) is None
