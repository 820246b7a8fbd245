"""Prepared forms give the bits of their ops, run after run, on every backend."""

import gc

import pytest
import torch
from torch import Tensor

from fps_kernels import ops
from tests.support.entries import AdamWProblem, AgreementProblem, bits


def twins(kind, *arguments):
    """Two problems with equal tensors of their own."""
    state = torch.get_rng_state()
    first = kind(*arguments)
    torch.set_rng_state(state)
    return first, kind(*arguments)


def prepared_adamw(problem: AdamWProblem, grads: list[Tensor]) -> ops.PreparedAdamW:
    csr = [offsets for offsets, _ in problem.csr], [columns for _, columns in problem.csr]
    return ops.prepared_adamw(
        problem.weights, grads, *csr, problem.masters, problem.exp_avgs, problem.exp_avg_sqs, problem.steps
    )


def equal(first: AdamWProblem, second: AdamWProblem) -> bool:
    def everything(problem):
        return *problem.weights, *problem.masters, *problem.exp_avgs, *problem.exp_avg_sqs, *problem.steps

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(everything(first), everything(second), strict=True))


@pytest.mark.parametrize("rates", ["numbers", "tensor"])
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_adamw(backend, device, dtype, compact, rates):
    """Steps whose numbers change or stay, whose gradients move or stay, some of them skipped."""
    ours, theirs = twins(AdamWProblem, device, dtype, None, compact)
    n = len(ours.weights)
    step = prepared_adamw(ours, ours.gradients())
    grads = ours.gradients()
    for number in range(6):
        if number % 2:
            for grad, fresh in zip(grads, ours.gradients(), strict=True):
                grad.copy_(fresh)
        else:
            grads = [grad.clone() for grad in ours.gradients()]
        copies = [grad.clone() for grad in grads]
        lrs, decays = [0.1 / (1 + number // 3 + i) for i in range(n)], [0.01 * (number // 4) * i for i in range(n)]
        betas, eps = ((0.9, 0.999), 1e-8) if number < 5 else ((0.0, 0.5), 1e-3)
        maximize, zero = number == 3, number == 4
        scale = torch.tensor(2.0, device=device) if number > 2 else None
        found_inf = torch.tensor(float(number == 2), device=device) if number in (2, 3) else None
        given = torch.tensor(lrs, dtype=torch.float64, device=device) if rates == "tensor" else lrs
        step.run(grads, ops.AdamWOptions(given, decays, *betas, eps, maximize, scale, found_inf, zero))
        theirs.step(copies, lrs, decays, betas, eps, maximize, scale, found_inf, zero)
        assert equal(ours, theirs), number
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(grads, copies, strict=True)), number
    assert [step.item() for step in ours.steps] == [5.0] * n


def test_adamw_takes_addresses(backend, device):
    ours, theirs = twins(AdamWProblem, device, torch.bfloat16, None, True)
    n = len(ours.weights)
    grads = ours.gradients()
    step = prepared_adamw(ours, grads)
    options = ops.AdamWOptions([0.1] * n, [0.1] * n, 0.9, 0.999, 1e-8, False, None, None, False)
    addresses = [grad.data_ptr() for grad in grads]
    if backend == "reference":
        with pytest.raises(TypeError, match="the reference backend needs the gradients, not their addresses"):
            step.run(addresses, options)
        return
    for _ in range(2):
        step.run(addresses, options)
        theirs.step(grads, [0.1] * n, [0.1] * n)
    assert equal(ours, theirs)


def test_adamw_refuses_gradients_of_another_kind(backend, device):
    problem, _ = twins(AdamWProblem, device, torch.float32, None, True, ["contiguous"])
    (grad,) = problem.gradients()
    step = prepared_adamw(problem, [grad])
    options = ops.AdamWOptions([0.1], [0.0], 0.9, 0.999, 1e-8, False, None, None, False)
    for wrong in (grad.double(), grad.repeat(2), grad.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"grads\[0\] must be torch.float32 of shape .* as when the step was prepared"):
            step.run([wrong], options)
    assert problem.steps[0].item() == 0
    for bad in (grad.double(), grad[1:], grad.repeat(2)[::2], torch.ones(1, 37, device=device).expand(13, 37)):
        with pytest.raises((TypeError, ValueError), match=r"grads\[0\]"):
            prepared_adamw(problem, [bad])


def test_agreement(backend, device, dtype):
    """All at once and one by one, after changes of every kind and after none."""
    ours, theirs = twins(AgreementProblem, device, dtype)
    prepared = ops.prepared_agreement(*ours.arguments)
    for number in range(6):
        state = torch.get_rng_state()
        for problem in (ours, theirs):
            torch.set_rng_state(state)
            if number in (0, 2, 3):
                problem.change(problem.values, torch.randn(50, device=device))
            if number in (1, 2, 4):
                problem.change_weights(torch.randn(50, device=device))
        if number < 3:
            prepared.run()
        else:
            for i in range(len(ours.weights)):
                prepared.run_one(i)
        ops.agree_values_(*theirs.arguments)
        assert all(torch.equal(a, b) for a, b in zip(ours.snapshot(), theirs.snapshot(), strict=True)), number


def test_agreement_of_one_leaves_the_others(backend, device):
    problem = AgreementProblem(device, torch.float32)
    prepared = ops.prepared_agreement(*problem.arguments)
    for values in problem.values:
        values += 1
    prepared.run_one(1)
    done = [torch.equal(values, agreed) for values, agreed in zip(problem.values, problem.agreed, strict=True)]
    assert done == [values.numel() == 0 or i == 1 for i, values in enumerate(problem.values)]


def test_parameters_that_require_gradients_keep_their_version(backend, device):
    """Content is compared: nobody needs a version counter, and a graph that saved the weight goes on."""
    W = torch.nn.Parameter(torch.ones(1, 3, device=device))
    values = torch.nn.Parameter(torch.full((2,), 5.0, device=device))
    offsets, columns = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [0, 2]))
    versions = W._version, values._version
    ops.prepared_agreement([W], [offsets], [columns], [values], [torch.ones(2, device=device)]).run()
    assert W.tolist() == [[5, 1, 5]]
    assert (W._version, values._version) == versions


def test_memory_stays_while_it_is_prepared(backend, device):
    """Whatever becomes of the tensors: a run writes to memory that nobody else has been given."""
    problem = AgreementProblem(device, torch.float32)
    prepared = ops.prepared_agreement(*problem.arguments)
    for tensors in problem.arguments[:1] + problem.arguments[3:]:
        for tensor in tensors:
            tensor.data = torch.zeros(0, device=device)
    del problem, tensor, tensors
    gc.collect()
    others = [torch.zeros(13 * 37, device=device) for _ in range(50)]
    prepared.run()
    assert not any(other.any() for other in others)


def test_nothing_to_prepare():
    with pytest.raises(ValueError, match="weights must not be empty"):
        ops.prepared_agreement([], [], [], [], [])
    with pytest.raises(ValueError, match="weights must not be empty"):
        ops.prepared_adamw([], [], [], [], [], [], [], [])
    with pytest.raises(ValueError, match="steps must have one item per weight"):
        ops.prepared_adamw([torch.ones(1, 1)], *[[torch.ones(1)]] * 6, [])


def test_a_step_begins_with_agreement_and_notes_what_it_ends_with(backend, device, dtype):
    """As agree_values_ before it, and the values copied after it: of some tensors, while others know no agreement."""
    ours, theirs = twins(AdamWProblem, device, dtype, None, True)
    n = len(ours.weights)
    for problem in (ours, theirs):
        problem.masters = [problem.values(i).float().clone() for i in range(n)]
    none = torch.empty(0, device=device)
    agreed = [none if i == 1 else master.clone() for i, master in enumerate(ours.masters)]
    known = [a.clone() for a in agreed]
    csr = [offsets for offsets, _ in ours.csr], [columns for _, columns in ours.csr]
    state = ours.masters, ours.exp_avgs, ours.exp_avg_sqs, ours.steps
    step = ops.prepared_adamw(ours.weights, ours.gradients(), *csr, *state, agreed)
    for number in range(3):
        change = [torch.rand(m.shape, device=device) for m in ours.masters]
        for problem in (ours, theirs):
            for i, (W, master) in enumerate(zip(problem.weights, problem.masters, strict=True)):
                master[change[i] < 0.2] += 1.0
                if number and i != 1:
                    rows, columns = problem.rows[i], problem.csr[i][1].long()
                    W[rows, columns] = torch.where(change[i] > 0.8, W[rows, columns] * 2, W[rows, columns])
        grads = ours.gradients()
        step.run(grads, ops.AdamWOptions([0.1] * n, [0.1] * n, 0.9, 0.999, 1e-8, False, None, None, False))
        chosen = [i for i in range(n) if i != 1]
        lists = theirs.weights, [o for o, _ in theirs.csr], [c for _, c in theirs.csr], theirs.masters, known
        ops.agree_values_(*([one[i] for i in chosen] for one in lists))
        theirs.step([g.clone() for g in grads], [0.1] * n, [0.1] * n)
        for i in chosen:
            known[i].copy_(theirs.masters[i])
        assert equal(ours, theirs), number
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(agreed, known, strict=True)), number
