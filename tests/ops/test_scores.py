"""``score_topk``, ``score_kth`` and ``score_select``: every backend makes exactly the reference's choice."""

import pytest
import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference

SHAPES = [(1, 1), (3, 5), (7, 63), (5, 130), (2, 1025), (33, 17)]


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, groups: int = 1) -> tuple[Tensor, Tensor]:
    W = torch.randn(shape, device=device).to(dtype)
    a = torch.rand(shape[1], device=device) if groups == 1 else torch.rand(groups, shape[1], device=device)
    return W, a


def tied(W: Tensor) -> Tensor:
    return (W.float() * 2).round().div(2).to(W.dtype)


def brute_topk(W: Tensor, a: Tensor, k: int) -> Tensor:
    """Row by row with Python's own stable sort: shares no code with any backend."""
    rows = []
    groups = a.reshape(-1, W.shape[1])
    for i, row in enumerate(W.float().cpu()):
        score = (row * groups[i // (W.shape[0] // len(groups))].cpu()).abs().tolist()
        rows.append(sorted(sorted(range(len(score)), key=lambda j: (score[j] != score[j] and -2 or -1, -score[j], j))[:k]))
    return torch.tensor(rows, dtype=torch.int32, device=W.device).reshape(W.shape[0], k)


@pytest.mark.parametrize("ties", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_matches_a_plain_sort(backend, device, dtype, shape, ties):
    W, a = inputs(shape, dtype, device)
    if ties:
        W, a = tied(W), tied(a)
    C = shape[1]
    for k in sorted({1, min(2, C), min(8, C), min(33, C), (C + 1) // 2, C - 1, C} - {0}):
        got = ops.score_topk(W, a, k)
        assert got.dtype == torch.int32
        assert torch.equal(got, brute_topk(W, a, k)), f"k={k}"


@pytest.mark.parametrize("k", [1, 3, 40])
def test_topk_groups(backend, device, k):
    W, a = inputs((12, 41), torch.float32, device, groups=4)
    assert torch.equal(ops.score_topk(W, a, k), brute_topk(W, a, k))


def strided_weights(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    base = torch.randn(38, 70, device=device).to(dtype)
    return {
        "transposed": base.t(),
        "sliced": base[3:21, 5:62],
        "every second column": base[:, ::2],
        "every second row": base[::2],
        "expanded row": base[:1].expand(6, 70),
        "expanded column": base[:, :1].expand(38, 9),
        "unaligned": base.flatten()[1 : 1 + 37 * 61].view(37, 61),
    }


@pytest.mark.parametrize("name", list(strided_weights(torch.device("cpu"), torch.float32)))
def test_strided(backend, device, dtype, name):
    W = strided_weights(device, dtype)[name]
    a = torch.rand(W.shape[1], device=device)
    for k in (1, 4, W.shape[1] // 2):
        assert torch.equal(ops.score_topk(W, a, k), brute_topk(W, a, k)), f"k={k}"
    check_threshold([W], [a], W.numel() // 3)


def test_topk_special_values(backend, device):
    W = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0, 0.0],
            [1e-45, -1e-45, 0.0, 2e-45, 1e-38],
            [float("nan"), 1.0, float("inf"), -float("inf"), float("nan")],
            [3e38, -3e38, 3e38, 1.0, -2.0],
        ],
        device=device,
    )
    a = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0], device=device)
    for factors in (a, a * 0, a * 10):
        for k in range(1, 6):
            expected = reference.score_topk(W, factors[None], k)
            assert torch.equal(ops.score_topk(W, factors, k), expected), f"k={k}"


def test_topk_nests(backend, device):
    W, a = inputs((9, 50), torch.float32, device)
    W = tied(W)
    previous: list[set[int]] = [set() for _ in range(9)]
    for k in range(1, 51, 7):
        current = [set(row) for row in ops.score_topk(W, a, k).tolist()]
        assert all(small < large for small, large in zip(previous, current, strict=True))
        previous = current


def test_topk_follows_a_permutation_of_rows(backend, device):
    W, a = inputs((31, 45), torch.float32, device)
    order = torch.randperm(31, device=device)
    assert torch.equal(ops.score_topk(W[order], a, 5), ops.score_topk(W, a, 5)[order])


def test_topk_no_rows(backend, device):
    assert ops.score_topk(torch.empty(0, 5, device=device), torch.rand(5, device=device), 2).shape == (0, 2)


def check_threshold(weights: list[Tensor], factors: list[Tensor], k: int) -> None:
    """``score_kth`` and ``score_select`` together choose exactly ``k`` entries: those of one stable sort of everything."""
    matrices = [a.reshape(-1, a.shape[-1]) for a in factors]
    all_scores = [reference.scores(W, a) for W, a in zip(weights, matrices, strict=True)]
    flat = torch.cat([s.flatten() for s in all_scores])
    order = flat.sort(descending=True, stable=True)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[order.indices[:k]] = True

    threshold, greater, equal = ops.score_kth(weights, factors, k)
    torch.testing.assert_close(threshold, order.values[k - 1], rtol=0, atol=0, equal_nan=True)
    assert greater.dtype == equal.dtype == torch.int64
    counts = ops.score_counts(weights, factors, threshold.expand(len(weights)))
    for found, expected in zip(counts, (greater, equal), strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
    ties_left = k - int(greater.sum())
    start = 0
    for i, (W, a) in enumerate(zip(weights, factors, strict=True)):
        ties = min(ties_left, int(equal[i]))
        ties_left -= ties
        row_offsets, columns = ops.score_select(W, a, threshold, int(greater[i]) + ties)
        mask = chosen[start : start + W.numel()].view(W.shape)
        start += W.numel()
        assert torch.equal(row_offsets.long(), torch.cat([row_offsets.new_zeros(1), mask.sum(1).cumsum(0)]).long())
        assert torch.equal(columns, mask.nonzero()[:, 1].int())
    assert ties_left == 0


# Tiles that are partly outside the matrix, in rows, in columns, in both.
@pytest.mark.parametrize("shape", [(43, 768), (40, 64), (43, 70), (8, 300)])
def test_threshold_of_masked_tiles(backend, device, dtype, shape):
    W, a = inputs(shape, dtype, device)
    for k in (1, W.numel() // 100, W.numel() - 1):
        check_threshold([W], [a], k)


@pytest.mark.parametrize("ties", [False, True], ids=["", "tied"])
def test_threshold_of_many_tensors(backend, device, dtype, ties):
    weights, factors = [], []
    for shape, groups in (((7, 63), 1), ((12, 10), 3), ((1, 1), 1), ((0, 4), 1), ((40, 33), 1)):
        W, a = inputs(shape, dtype, device, groups)
        weights.append(tied(W) if ties else W)
        factors.append(tied(a) if ties else a)
    total = sum(W.numel() for W in weights)
    for k in (1, 2, total // 100, total // 3, total - 1, total):
        check_threshold(weights, factors, k)


def test_threshold_of_mixed_dtypes(backend, device):
    weights = [torch.randn(9, 21, device=device).to(d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    check_threshold(weights, [torch.rand(21, device=device) for _ in weights], 100)


@pytest.mark.parametrize(
    "fill",
    [
        lambda W: W.zero_(),
        lambda W: W.fill_(-0.5),
        lambda W: W.copy_((W > 1.5).float() * 1e30 + 1e-30),
        lambda W: W.copy_(W.sort(dim=1).values),
        lambda W: W.masked_fill_(W > 1, float("nan")),
        lambda W: W.mul_(1e-42),
        lambda W: W.sign_(),
    ],
    ids=["zero", "constant", "bimodal", "sorted", "nan", "denormal", "signs"],
)
def test_threshold_of_awkward_distributions(backend, device, fill):
    W, a = inputs((23, 77), torch.float32, device)
    fill(W)
    for k in (1, 18, 885, W.numel()):
        check_threshold([W], [a], k)
        check_threshold([W], [torch.ones_like(a)], k)


def test_counts_of_own_thresholds(backend, device, dtype):
    """Each tensor is compared with its own threshold, whatever that is."""
    W, a = inputs((23, 77), dtype, device, 1)
    scores = reference.scores(W, a.reshape(1, -1))
    cases = [0.0, -0.0, float("inf"), float("nan"), float(scores.max()), float(scores.flatten()[100])]
    greater, equal = ops.score_counts([W] * len(cases), [a] * len(cases), torch.tensor(cases, device=device))
    assert greater.tolist() == [int((scores > t).sum()) for t in cases]
    assert equal.tolist() == [int((scores == t).sum()) for t in cases]


def test_opcheck(backend, device):
    W, a = inputs((6, 9), torch.float32, device)
    torch.library.opcheck(ops.score_topk, (W, a, 2))
    torch.library.opcheck(ops.score_kth, ([W, W.clone()], [a, a.clone()], 5))
    threshold, greater, _ = ops.score_kth([W], [a], 5)
    torch.library.opcheck(ops.score_counts, ([W, W.clone()], [a, a.clone()], torch.rand(2, device=device)))
    torch.library.opcheck(ops.score_select, (W, a, threshold, int(greater) + 1))


W, A = torch.ones(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((W, A, 0), ValueError, "k must be between 1 and the 6 columns"),
        ((W, A, 7), ValueError, "k must be between 1 and the 6 columns"),
        ((W.long(), A, 1), TypeError, "W must be float32"),
        ((W, A.double(), 1), TypeError, "a must be torch.float32"),
        ((W, A[:5], 1), ValueError, r"a must be \[6\] or \[G, 6\]"),
        ((W, torch.ones(3, 6), 1), ValueError, "3 groups, which do not divide the 4 rows"),
        ((A, A, 1), ValueError, r"W must be \[O, C\]"),
    ],
)
def test_topk_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ops.score_topk(*arguments)


def test_threshold_bad_arguments():
    with pytest.raises(ValueError, match="one tensor per weight"):
        ops.score_kth([W, W], [A], 1)
    with pytest.raises(ValueError, match="between 1 and the 24 entries"):
        ops.score_kth([W], [A], 25)
    with pytest.raises(TypeError, match=r"a\[1\] must be torch.float32"):
        ops.score_kth([W, W], [A, A.double()], 1)
    with pytest.raises(ValueError, match="one tensor per weight"):
        ops.score_counts([W, W], [A], torch.zeros(2))
    with pytest.raises(ValueError, match=r"thresholds must have shape \[1\]"):
        ops.score_counts([W], [A], torch.tensor(0.0))
    with pytest.raises(TypeError, match=r"thresholds must be torch.float32"):
        ops.score_counts([W], [A], torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="nnz must be between 0 and 24, got 25"):
        ops.score_select(W, A, torch.tensor(0.5), 25)


def test_select_refuses_a_wrong_count(backend, device):
    if device.type == "cuda":
        return  # would wait for the device: documented
    for threshold, nnz in ((0.5, 5), (0.5, 23), (1.5, 1)):
        with pytest.raises(ValueError, match="nnz must be what the threshold divides"):
            ops.score_select(W, A, torch.tensor(threshold), nnz)
