"""``scatter_values_`` and ``masked_adamw_`` on every backend."""

import pytest
import torch

from fps_kernels import ops
from fps_kernels.ops import reference
from tests.support.entries import INT, LAYOUTS, AdamWProblem, bits, layouts, random_csr


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter(backend, device, dtype, layout, values_dtype):
    W = layouts(device, dtype)[layout]
    row_offsets, columns = random_csr(*W.shape, device)
    values = torch.randn(columns.numel(), device=device).to(values_dtype)
    expected = W.clone()
    rows = reference.entry_rows(row_offsets)
    for row, column, value in zip(rows.tolist(), columns.tolist(), values, strict=True):
        expected[row, column] = value
    ops.scatter_values_(W, row_offsets, columns, values)
    assert torch.equal(bits(W), bits(expected))


def test_scatter_rounds_to_nearest_even(backend, device):
    W = torch.zeros(1, 4, dtype=torch.bfloat16, device=device)
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, float("nan")], device=device)
    ops.scatter_values_(W, torch.tensor([0, 4], dtype=INT, device=device), torch.arange(4, dtype=INT, device=device), values)
    assert torch.equal(W.float().nan_to_num(-1), values.to(torch.bfloat16).view(1, 4).float().nan_to_num(-1))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_follows_torch_adamw(backend, device, compact, maximize):
    """Ten steps with one learning rate and decay per tensor stay within the stated bound of torch.optim.AdamW."""
    problem = AdamWProblem(device, torch.float32, compact=compact)
    n = len(problem.weights)
    lrs, decays = [10.0 ** -(1 + i) for i in range(n)], [0.1 * i for i in range(n)]
    peers = [torch.nn.Parameter(problem.values(i).clone()) for i in range(n)]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(peers, lrs, decays, strict=True)],
        maximize=maximize,
        foreach=False,
    )
    for _ in range(10):
        grads = problem.gradients()
        for peer, grad in zip(peers, problem.at_entries(grads), strict=True):
            peer.grad = grad.float()
        optimizer.step()
        problem.step(grads, lrs, decays, maximize=maximize)
    for i, peer in enumerate(peers):
        moved = 10 * lrs[i] * (1 + decays[i] * peer.abs().max().item() if peer.numel() else 1)
        torch.testing.assert_close(problem.values(i), peer.data, rtol=10 * 2**-23, atol=2e-6 * moved)
        assert problem.steps[i].item() == 10


def test_unselected_entries_keep_their_bits(backend, device, dtype):
    problem = AdamWProblem(device, dtype)
    n = len(problem.weights)
    for _ in range(3):
        problem.step(problem.gradients(), [0.1] * n, [0.5] * n)
    for i, (W, before) in enumerate(zip(problem.weights, problem.before, strict=True)):
        selected = torch.zeros(W.shape, dtype=torch.bool, device=device)
        selected[problem.rows[i], problem.csr[i][1].long()] = True
        assert torch.equal(bits(W)[~selected], bits(before)[~selected])
        if selected.any():
            assert not torch.equal(bits(W)[selected], bits(before)[selected])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_have_float32_masters(backend, device, dtype, grad_dtype):
    """Against the reference in float32: the master moves even where a 16-bit weight could not."""
    problem = AdamWProblem(device, dtype, grad_dtype)
    n = len(problem.weights)
    expected_values = [problem.values(i).double() for i in range(n)]
    m = [torch.zeros_like(v) for v in expected_values]
    v2 = [torch.zeros_like(v) for v in expected_values]
    for step in range(1, 4):
        grads = problem.gradients()
        problem.step(grads, [1e-4] * n, [0.01] * n)
        for i, grad in enumerate(problem.at_entries(grads)):
            g = grad.double()
            m[i] = 0.9 * m[i] + 0.1 * g
            v2[i] = 0.999 * v2[i] + 0.001 * g * g
            decayed = expected_values[i] * (1 - 1e-4 * 0.01)
            update = (m[i] / (1 - 0.9**step)) / ((v2[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected_values[i] = decayed - 1e-4 * update
    for i in range(n):
        torch.testing.assert_close(problem.values(i).double(), expected_values[i], rtol=9 * 2**-24, atol=1e-9)
        assert torch.equal(problem.weights[i][problem.rows[i], problem.csr[i][1].long()], problem.values(i).to(dtype))


def test_grad_scale_and_found_inf(backend, device):
    scaled, plain = AdamWProblem(device, torch.float32, names=["contiguous"]), None
    grads = scaled.gradients()
    twin = [W.clone() for W in scaled.weights]
    scaled.step([g * 1024 for g in grads], [0.1], [0.0], scale=torch.tensor(1024.0, device=device))
    plain = AdamWProblem(device, torch.float32, names=["contiguous"])
    plain.weights, plain.csr, plain.rows = twin, scaled.csr, scaled.rows
    plain.exp_avgs = [torch.zeros_like(m) for m in scaled.exp_avgs]
    plain.exp_avg_sqs = [torch.zeros_like(m) for m in scaled.exp_avgs]
    plain.step(grads, [0.1], [0.0], found_inf=torch.tensor(0.0, device=device))
    assert torch.equal(bits(scaled.weights[0]), bits(twin[0]))

    state = [t.clone() for t in (*twin, *plain.exp_avgs, *plain.exp_avg_sqs, *plain.steps)]
    bad = [torch.full_like(g, float("inf")) for g in grads]
    plain.step(bad, [0.1], [0.1], found_inf=torch.tensor(1.0, device=device))
    for before, after in zip(state, (*twin, *plain.exp_avgs, *plain.exp_avg_sqs, *plain.steps), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_zeroes_the_gradients_it_read(backend, device, dtype, compact, skipped):
    """Those of the selected entries, of a skipped step too; the update is the same, and the other gradients stay."""
    problem, twin = AdamWProblem(device, dtype, compact=compact), AdamWProblem(device, dtype, compact=compact)
    twin.weights, twin.csr, twin.rows = [W.clone() for W in problem.weights], problem.csr, problem.rows
    twin.masters = [m.clone() for m in problem.masters]
    twin.exp_avgs = [torch.zeros_like(m) for m in problem.exp_avgs]
    twin.exp_avg_sqs = [torch.zeros_like(m) for m in problem.exp_avgs]
    n = len(problem.weights)
    grads = problem.gradients()
    kept = [g.clone() for g in grads]
    found_inf = torch.tensor(float(skipped), device=device)
    problem.step(grads, [0.1] * n, [0.0] * n, found_inf=found_inf, zero=True)
    twin.step(kept, [0.1] * n, [0.0] * n, found_inf=found_inf)
    for W, other in zip(problem.weights, twin.weights, strict=True):
        assert torch.equal(bits(W), bits(other))
    for g, before, rows, (_, columns) in zip(grads, kept, problem.rows, problem.csr, strict=True):
        expected = before.clone()
        expected[... if compact else (rows, columns.long())] = 0
        assert torch.equal(bits(g), bits(expected))


def test_strided_dense_gradients(backend, device):
    problem = AdamWProblem(device, torch.float32, names=["contiguous", "transposed"])
    grads = [torch.randn(37, 13, device=device).t(), torch.randn(13, 74, device=device)[:, ::2]]
    expected = AdamWProblem(device, torch.float32, names=["contiguous", "transposed"])
    expected.weights = [W.clone() for W in problem.weights]
    expected.csr, expected.rows = problem.csr, problem.rows
    expected.exp_avgs = [torch.zeros_like(m) for m in problem.exp_avgs]
    expected.exp_avg_sqs = [torch.zeros_like(m) for m in problem.exp_avgs]
    problem.step(grads, [0.1, 0.1], [0.0, 0.0])
    expected.step([g.contiguous() for g in grads], [0.1, 0.1], [0.0, 0.0])
    for W, twin in zip(problem.weights, expected.weights, strict=True):
        assert torch.equal(W, twin)


def test_nothing_to_do(backend, device):
    lrs = torch.zeros(0, dtype=torch.float64, device=device)
    ops.masked_adamw_([], [], [], [], [], [], [], [], lrs, [], 0.9, 0.999, 1e-8, False, None, None, False)


def test_opcheck(backend, device):
    W = torch.randn(5, 7, device=device)
    row_offsets, columns = random_csr(5, 7, device)
    torch.library.opcheck(ops.scatter_values_, (W, row_offsets, columns, torch.randn(columns.numel(), device=device)))
    state = [torch.zeros(columns.numel(), device=device) for _ in range(2)]
    lrs = torch.tensor([0.1], dtype=torch.float64, device=device)
    arguments = ([W], [torch.randn_like(W)], [row_offsets], [columns], [torch.empty(0, device=device)], [state[0]])
    arguments += ([state[1]], [torch.zeros((), device=device)], lrs, [0.0], 0.9, 0.999, 1e-8, False, None, None, False)
    torch.library.opcheck(ops.masked_adamw_, arguments)


def test_bad_arguments():
    W = torch.ones(4, 6)
    before = W.clone()
    offsets, columns = torch.tensor([0, 1, 1, 2, 2], dtype=INT), torch.tensor([3, 5], dtype=INT)
    for arguments, error, match in (
        ((W, offsets.long(), columns, torch.ones(2)), TypeError, "row_offsets must be torch.int32"),
        ((W, offsets[:-1], columns, torch.ones(2)), ValueError, r"row_offsets must have shape \[5\]"),
        ((W, offsets, columns, torch.ones(3)), ValueError, r"values must have shape \[2\]"),
        ((W.long(), offsets, columns, torch.ones(2)), TypeError, "W must be float32"),
    ):
        with pytest.raises(error, match=match):
            ops.scatter_values_(*arguments)
    state = torch.zeros(2)
    lrs = torch.tensor([0.1], dtype=torch.float64)

    def call(zero_grads=False, **change):
        arguments = {
            "weights": [W],
            "grads": [torch.ones(4, 6)],
            "row_offsets": [offsets],
            "columns": [columns],
            "masters": [torch.empty(0)],
            "exp_avgs": [state],
            "exp_avg_sqs": [state.clone()],
            "steps": [torch.tensor(0.0)],
            "lrs": lrs,
            "weight_decays": [0.0],
        }
        ops.masked_adamw_(*(arguments | change).values(), 0.9, 0.999, 1e-8, False, None, None, zero_grads)

    for change, error, match in (
        ({"grads": []}, ValueError, "grads must have one item per weight"),
        ({"grads": [torch.ones(4, 5)]}, ValueError, r"grads\[0\] must have shape \[4, 6\]"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] must have shape \[2\]"),
        ({"exp_avgs": [state.double()]}, TypeError, r"exp_avgs\[0\] must be torch.float32"),
        ({"lrs": lrs.float()}, TypeError, "lrs must be torch.float64"),
        ({"steps": [torch.zeros(1)]}, ValueError, r"steps\[0\] must have shape \[\]"),
    ):
        with pytest.raises(error, match=match):
            call(**change)
    with pytest.raises(ValueError, match=r"grads\[0\] is expanded"):
        call(zero_grads=True, grads=[torch.ones(1, 6).expand(4, 6)])
    with pytest.raises(ValueError, match=r"grads\[0\] must be contiguous"):
        call(zero_grads=True, grads=[torch.ones(4)[::2]])
    assert torch.equal(W, before)
