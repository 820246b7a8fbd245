"""Every kind of weight, end to end: chosen from, trained, stored; gradients are those of the dense weight.

What calibration recognises, ``attach`` trains: each function that is read has a model here.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.weights.kinds import READERS, SCORED_FUNCTIONS
from tests.support.tolerances import assert_sums_close

aten = torch.ops.aten


class Multiplying(nn.Module):
    """One weight, multiplied by a function, and a head."""

    def __init__(self, shape: tuple[int, ...], use, outputs: int) -> None:
        super().__init__()
        self.before = nn.Linear(1, 1)  # so that what is multiplied has a gradient
        self.weight = nn.Parameter(torch.randn(shape) * 0.3)
        self.use = use
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.unsqueeze(-1)).squeeze(-1)
        y = self.use(x, self.weight)
        return self.head(y.reshape(-1, self.head.in_features)).square().mean(0)


def experts(x: Tensor, w: Tensor) -> Tensor:
    """As mixtures of experts loop over those that some token was sent to."""
    parts = [F.linear(x[i * 4 : (i + 1) * 4], w[torch.tensor(i)]) for i in (0, 2)]
    return torch.cat(parts)


def rows_of_a_cast(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(x.bfloat16(), rows).float() for rows in w.to(torch.bfloat16).chunk(2)], 1)


def rows_of_a_transposed_copy(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(x, rows) for rows in w.t().contiguous().split(4)], 1)


def dbrx(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([x[i::3] @ w.view(3, 8, 6)[i] for i in range(3)])


OFFSETS = torch.tensor([5, 5, 12], dtype=torch.int32)
# Name -> shape of the input, of the weight, the function, numbers of outputs.
MODELS = {
    "F.linear": ((4, 6), (5, 6), lambda x, w: F.linear(x, w), 5),
    "aten.linear": ((4, 6), (5, 6), lambda x, w: aten.linear.default(x, w), 5),
    "linear of a transposed weight": ((4, 6), (6, 5), lambda x, w: F.linear(x, w.t()), 5),
    "linear of rows": ((4, 6), (9, 6), lambda x, w: torch.cat([F.linear(x, r) for r in w.split([4, 5])], 1), 9),
    "linear of narrowed rows": ((4, 6), (8, 6), lambda x, w: F.linear(x, w.narrow(0, 0, 4)) - F.linear(x, w[4:]), 4),
    "linear of unbound heads": ((4, 6), (8, 6), lambda x, w: torch.cat([F.linear(x, h) for h in w.view(2, 4, 6)], 1), 8),
    "as_strided": ((4, 6), (5, 6), lambda x, w: F.linear(x, w.as_strided((5, 6), (6, 1))), 5),
    "view_as": ((4, 6), (30,), lambda x, w: F.linear(x, w.view_as(x.new_empty(5, 6))), 5),
    "cast": ((4, 6), (5, 6), lambda x, w: F.linear(x.bfloat16(), w.bfloat16()).float(), 5),
    "rows of a cast": ((4, 6), (8, 6), rows_of_a_cast, 8),
    "a transposed copy": ((4, 6), (6, 5), lambda x, w: F.linear(x, w.t().contiguous()), 5),
    "rows of a transposed copy": ((4, 6), (6, 8), rows_of_a_transposed_copy, 8),
    "addmm": ((4, 6), (6, 5), lambda x, w: torch.addmm(x.new_ones(5), x, w), 5),
    "Tensor.addmm": ((4, 6), (6, 5), lambda x, w: x.new_ones(4, 5).addmm(x, w), 5),
    "aten.addmm": ((4, 6), (6, 5), lambda x, w: aten.addmm.default(x.new_ones(5), x, w), 5),
    "x @ w": ((2, 4, 6), (6, 5), lambda x, w: x @ w, 5),
    "x @ w.T": ((2, 4, 6), (5, 6), lambda x, w: x @ w.T, 5),
    "w @ x": ((6, 4), (5, 6), lambda x, w: w @ x, 5),
    "torch.matmul": ((4, 6), (6, 5), lambda x, w: torch.matmul(x, w), 5),
    "aten.matmul": ((4, 6), (6, 5), lambda x, w: aten.matmul.default(x, w), 5),
    "rmatmul": ((4, 6), (6, 5), lambda x, w: w.__rmatmul__(x), 5),
    "mm": ((4, 6), (6, 5), lambda x, w: torch.mm(x, w), 5),
    "Tensor.mm": ((4, 6), (6, 5), lambda x, w: x.mm(w), 5),
    "aten.mm": ((4, 6), (6, 5), lambda x, w: aten.mm.default(x, w), 5),
    "bmm": ((3, 4, 6), (3, 6, 5), lambda x, w: torch.bmm(x, w), 5),
    "Tensor.bmm": ((3, 4, 6), (3, 5, 6), lambda x, w: x.bmm(w.transpose(1, 2)), 5),
    "aten.bmm": ((3, 4, 6), (3, 6, 5), lambda x, w: aten.bmm.default(x, w), 5),
    "bmm, the weight first": ((3, 6, 4), (3, 5, 6), lambda x, w: torch.bmm(w, x), 5),
    "baddbmm": ((3, 4, 6), (3, 6, 5), lambda x, w: torch.baddbmm(x.new_ones(3, 1, 5), x, w), 5),
    "Tensor.baddbmm": ((3, 4, 6), (3, 6, 5), lambda x, w: x.new_ones(3, 4, 5).baddbmm(x, w), 5),
    "aten.baddbmm": ((3, 4, 6), (3, 6, 5), lambda x, w: aten.baddbmm.default(x.new_ones(3, 4, 5), x, w), 5),
    "einsum": ((2, 4, 6), (6, 3, 5), lambda x, w: torch.einsum("ibh,hnd->ibnd", x, w), 15),
    "einsum of heads": ((2, 4, 3, 5), (6, 3, 5), lambda x, w: torch.einsum("ibnd,hnd->ibh", x, w), 6),
    "aten.einsum": ((2, 4, 6), (6, 5), lambda x, w: aten.einsum.default("bsc,co->bso", [x, w]), 5),
    "experts": ((12, 6), (3, 5, 6), experts, 5),
    "grouped_mm": ((12, 8), (3, 8, 16), lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), 16),
    "_grouped_mm": ((12, 8), (3, 16, 8), lambda x, w: torch._grouped_mm(x, w.transpose(-2, -1), offs=OFFSETS), 16),
    "aten._grouped_mm": ((12, 8), (3, 8, 16), lambda x, w: aten._grouped_mm.default(x, w, offs=OFFSETS), 16),
    "stacked experts": ((12, 8), (24, 6), dbrx, 6),
    "conv1d": ((2, 4, 9), (5, 4, 3), lambda x, w: F.conv1d(x, w, padding=1), 5),
    "aten.conv1d": ((2, 4, 9), (5, 4, 3), lambda x, w: aten.conv1d.default(x, w), 5),
    "aten.conv1d.padding": ((2, 4, 9), (5, 4, 3), lambda x, w: aten.conv1d.padding(x, w, padding="same"), 5),
    "conv2d": ((2, 4, 7, 6), (5, 4, 3, 2), lambda x, w: F.conv2d(x, w, stride=2), 5),
    "aten.conv2d": ((2, 4, 7, 6), (5, 4, 3, 2), lambda x, w: aten.conv2d.default(x, w), 5),
    "aten.conv2d.padding": ((2, 4, 7, 6), (5, 4, 3, 3), lambda x, w: aten.conv2d.padding(x, w, padding="same"), 5),
    "grouped conv2d": ((2, 4, 7, 6), (6, 2, 3, 3), lambda x, w: F.conv2d(x, w, groups=2), 6),
    "conv3d": ((2, 4, 5, 4, 4), (5, 4, 3, 2, 2), lambda x, w: F.conv3d(x, w, padding=1), 5),
    "aten.conv3d": ((2, 4, 4, 4, 4), (5, 4, 2, 2, 2), lambda x, w: aten.conv3d.default(x, w, None, [2, 2, 2]), 5),
    "aten.conv3d.padding": ((2, 4, 4, 4, 4), (5, 4, 3, 3, 3), lambda x, w: aten.conv3d.padding(x, w, padding="same"), 5),
    "aten.convolution": (
        (2, 4, 7, 6), (5, 4, 3, 2),
        lambda x, w: aten.convolution.default(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), 5,
    ),
    "conv_transpose1d": ((2, 4, 9), (4, 5, 3), lambda x, w: F.conv_transpose1d(x, w, stride=2), 5),
    "aten.conv_transpose1d": ((2, 4, 9), (4, 5, 3), lambda x, w: aten.conv_transpose1d.default(x, w), 5),
    "conv_transpose2d": ((2, 4, 5, 6), (4, 5, 2, 2), lambda x, w: F.conv_transpose2d(x, w, stride=2), 5),
    "aten.conv_transpose2d": ((2, 4, 5, 6), (4, 5, 2, 2), lambda x, w: aten.conv_transpose2d.input(x, w), 5),
}  # fmt: skip


def made(name: str) -> tuple[Multiplying, Tensor]:
    torch.manual_seed(sum(map(ord, name)))
    input_shape, shape, use, outputs = MODELS[name]
    return Multiplying(shape, use, outputs), torch.randn(input_shape)


@pytest.mark.filterwarnings("ignore:no token was sent", "ignore:.*has fewer")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "view_as"])
def test_chosen_trained_and_stored(name, backend, tmp_path):
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    with fps.use_backend(backend):
        selection = fps.select(model, [x], budget=fps.PerNeuron(2), dense=["head.*"], include="weight", progress=False)
        entries = selection["weight"]
        dense = copy.deepcopy(model)
        dense(x).sum().backward()
        expected = entries.of(dense.weight.grad)
        tuner = fps.attach(model, selection)
        model(x).sum().backward()
        (value,) = tuner.compact.values()
        assert_sums_close(value.grad, expected, 1e-2 if "cast" in name else 1e-5)  # the dense one is rounded to bfloat16
        assert expected.abs().max() > 0
        assert model.weight.grad is None
        optimizer = fps.MaskedAdamW(tuner, lr=0.01)
        optimizer.step()
    mask = entries.mask()
    assert torch.equal(model.weight[~mask], before["weight"][~mask])
    assert (model.weight[mask] != before["weight"][mask]).float().mean() > 0.3
    fps.save_delta(tuner, tmp_path / "d.safetensors")
    tuned = model.weight.detach().clone()
    tuner.detach()
    delta = fps.load_delta(tmp_path / "d.safetensors")
    fresh = made(name)[0]
    fresh.load_state_dict(before)
    delta.apply_(fresh)
    assert torch.equal(fresh.weight, tuned)
    delta.revert_(fresh)
    assert torch.equal(fresh.weight, before["weight"])
    selection.save(tmp_path / "s.safetensors")
    assert torch.equal(fps.Selection.load(tmp_path / "s.safetensors")["weight"].mask(), mask)


@pytest.mark.filterwarnings("ignore:no token was sent", "ignore:.*has fewer")
@pytest.mark.parametrize("budget", [fps.PerTensor(0.3), fps.Global(0.3), fps.LikeLoRA(1)], ids=repr)
@pytest.mark.parametrize("name", ["bmm", "einsum", "stacked experts", "conv_transpose2d", "grouped_mm", "experts"])
def test_scores_are_magnitude_times_mean_input(name, budget):
    """The choice of a whole matrix, made without one."""
    model, x = made(name)
    stats = fps.calibrate(model, [x], progress=False)
    selection = fps.select(model, stats=stats, budget=budget, dense=["head.*"], include="weight", progress=False)
    entries, filled = selection["weight"], stats["weight"].filled(1)
    factors = filled.mean().float()
    matrix = entries.layout.matrix(model.weight)
    scores = (matrix * factors.repeat_interleave(matrix.shape[0] // len(factors), 0)).abs()
    lowest = scores.flatten().topk(entries.nnz).values[-1]
    chosen = scores[entries.rows(), entries.columns.long()]
    assert entries.nnz > 3
    assert float(chosen.min()) == float(lowest)


@pytest.mark.parametrize("name", ["x @ w.T", "bmm", "einsum", "conv1d", "conv3d", "conv_transpose2d", "linear of rows"])
def test_second_derivatives_and_functional_calls(name):
    model, x = made(name)
    dense = copy.deepcopy(model)
    selection = fps.select(model, [x], budget=fps.PerTensor(0.3), dense=["head.*"], include="weight", progress=False)
    entries = selection["weight"]

    mask = entries.mask()
    (g,) = torch.autograd.grad(dense(x).sum(), dense.weight, create_graph=True)
    (expected,) = torch.autograd.grad((g * mask).square().sum(), dense.weight)
    tuner = fps.attach(model, selection)
    (value,) = tuner.compact.values()
    (g,) = torch.autograd.grad(model(x).sum(), value, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), value)
    assert_sums_close(found, entries.of(expected), 1e-4)
    moved = {name: p + 0.1 for name, p in model.named_parameters() if p.requires_grad}
    called = torch.func.functional_call(model, moved, (x,))
    with torch.no_grad():
        plain = {name: p.detach() for name, p in dense.named_parameters()}
        plain["weight"] = plain["weight"] + 0.1 * mask
        plain |= {name: value for name, value in moved.items() if name.startswith("head")}
        assert torch.allclose(called, torch.func.functional_call(dense, plain, (x,)), atol=1e-5)


@pytest.mark.filterwarnings("ignore:no token was sent")
def test_an_expert_that_saw_no_token_is_scored_by_what_the_others_saw():
    model, x = made("experts")
    stats = fps.calibrate(model, [x], progress=False)
    assert stats["weight"].rows == (4, 0, 4)
    assert stats["weight"].unseen == 1
    mean = stats["weight"].filled(1).mean()
    assert torch.allclose(mean[1], (mean[0] + mean[2]) / 2)
    with pytest.warns(UserWarning, match="no token was sent to 1 of the 3 experts in weight"):
        fps.select(model, [x], budget=fps.PerNeuron(2), include="weight", progress=False)


def test_every_function_that_is_read_has_a_model_here():
    seen = set()

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    for name in MODELS:
        model, x = made(name)
        with Noting():
            model(x)
    assert {function for function in SCORED_FUNCTIONS if function not in seen} == set()
    assert set(READERS) - SCORED_FUNCTIONS == {F.embedding}


def test_exported_programs_are_chosen_from_and_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(2), nn.Linear(49, 6), nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,)).module()
    selection = fps.select(program, [x], budget=fps.PerNeuron(2), dense=[], progress=False)
    assert len(selection) == 2
    model(x).square().sum().backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    tuner = fps.attach(program, selection)
    program(x).square().sum().backward()
    for name, value in tuner.compact.items():
        assert_sums_close(value.grad, selection[name].of(dense[name]), name=name)


@pytest.mark.parametrize("use", [lambda x, w: x @ w.T, lambda x, w: F.linear(x, w[:3])], ids=["x @ w.T", "rows"])
def test_compiled_views_are_an_error_and_no_lost_gradient(use):
    model = Multiplying((6, 6) if use(torch.randn(2, 6), torch.randn(6, 6)).shape[1] == 6 else (3, 6), use, 1)
    model.head = nn.Identity()
    model.head.in_features = 1
    x = torch.randn(4, 6)
    tuner = fps.attach(model, {"weight": torch.rand(model.weight.shape) < 0.5})
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="a gradient reached weight through"):
        compiled(x).sum().backward()
    assert all(value.grad is None for value in tuner.compact.values())
