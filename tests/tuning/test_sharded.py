"""``attach`` of models that ``fully_shard`` has cut: two processes on halves of a batch are one that adds up the halves, bit
for bit."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps
from tests.support.groups import in_processes, in_two_processes, join, leave
from tests.support.sharding import Block, Mixture, batches, largest_difference, mixture, shard, whole

Optimizer = Callable[[fps.Tuner], torch.optim.Optimizer]


def masked(tuner: fps.Tuner) -> fps.MaskedAdamW:
    return fps.MaskedAdamW(tuner, lr=1e-2, weight_decay=0.1)


def zeroing(tuner: fps.Tuner) -> fps.MaskedAdamW:
    return fps.MaskedAdamW(tuner, lr=1e-2, weight_decay=0.1, zero_grads=True)


def adamw(tuner: fps.Tuner) -> torch.optim.AdamW:
    return torch.optim.AdamW(tuner.parameters(), lr=1e-2, weight_decay=0.1)


def sgd(tuner: fps.Tuner) -> torch.optim.SGD:
    return torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9)


def chosen(model: nn.Module | None = None, budget: Any = None) -> fps.Selection:
    model = mixture() if model is None else model
    budget = fps.PerNeuron(2) if budget is None else budget
    return fps.select(model, [batches()[0][0]], budget=budget, process_group=False, progress=False)


def alone(
    optimizer: Optimizer, selection: fps.Selection, model: nn.Module | None = None, clip: float = 0.0
) -> tuple[nn.Module, fps.Tuner, torch.optim.Optimizer]:
    """One process that adds up what all have."""
    model = mixture() if model is None else model
    tuner = fps.attach(model, selection)
    made, size = optimizer(tuner), dist.get_world_size()
    for x, y in batches():
        made.zero_grad()
        for part in range(size):
            (F.cross_entropy(model(x[part::size]), y[part::size]) / size).backward()
        if clip:
            nn.utils.clip_grad_norm_(list(tuner.parameters()), clip)
        made.step()
    return model, tuner, made


def together(
    optimizer: Optimizer, selection: fps.Selection, model: nn.Module | None = None, clip: float = 0.0, **options: Any
) -> tuple[nn.Module, fps.Tuner, torch.optim.Optimizer]:
    """This process on its part."""
    model = shard(mixture()) if model is None else model
    tuner = fps.attach(model, selection, **options)
    made = optimizer(tuner)
    go_on(model, made, clip)
    return model, tuner, made


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()


def optimizers() -> None:
    join()
    base = whole(mixture())
    for budget in (fps.PerNeuron(2), fps.Global(0.02)):
        selection = chosen(budget=budget)
        for optimizer, clip in ((masked, 0.0), (zeroing, 0.0), (adamw, 0.0), (sgd, 0.0), (masked, 0.01), (adamw, 0.01)):
            (one, tuner, made), (cut, pieces, many) = (way(optimizer, selection, clip=clip) for way in (alone, together))
            # A norm over processes is one of their norms: it is rounded in another order than that of one process.
            same = partial(torch.allclose, rtol=1e-3, atol=2e-5) if clip else torch.equal
            assert largest_difference(one, cut) <= (2e-5 if clip else 0), (optimizer, clip)
            found = whole(cut)
            for name, w in selection.items():
                mask = w.mask()
                assert torch.equal(found[name][~mask], base[name][~mask]), name
                assert not w.nnz or not torch.equal(found[name][mask], base[name][mask]), name
            values = pieces.state_dict()
            for name, expected in tuner.state_dict().items():
                assert same(values[name], expected), name
            if optimizer is masked:
                states, expected_states = many.state_dict(), made.state_dict()
                assert states["param_groups"] == expected_states["param_groups"]
                for i, of in expected_states["state"].items():
                    assert all(same(states["state"][i][key], value) for key, value in of.items())
            rows = sum(p.to_local().numel() for p in pieces.compact.values())
            assert rows < 0.7 * selection.nnz + 4 * len(selection)  # of each weight this process has its part
    leave()


def test_every_optimizer_is_that_of_one_process(tmp_path):
    in_two_processes(optimizers, tmp_path)


class Shapes(TorchDispatchMode):
    """Notes shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "view" not in str(function) and function is not torch.ops.aten.t.default:
            self.made |= {tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@contextlib.contextmanager
def checkpointed() -> Iterator[nn.Module]:
    model = mixture()
    for block in model.blocks:
        block.__class__ = Checkpointed
    yield model


def tied() -> nn.Module:
    model = mixture()
    model.blocks[1].down.weight = model.blocks[0].down.weight
    return model


def ways() -> None:
    """Whatever else a model or a loop does."""
    rank, size = join()
    selection = chosen()
    one = alone(masked, selection)[0]

    offload = CPUOffloadPolicy(pin_memory=False)
    assert largest_difference(one, together(masked, selection, shard(mixture(), offload_policy=offload))[0]) == 0
    assert largest_difference(one, together(masked, selection, shard(mixture(), reshard_after_forward=False))[0]) == 0
    assert largest_difference(one, together(masked, selection, keep_bits=8)[0]) == 0  # all of it is too small to be packed
    with checkpointed() as first, checkpointed() as second:
        expected = alone(masked, selection, first)[0]
        assert largest_difference(expected, together(masked, selection, shard(second))[0]) == 0
    of_tied = chosen(tied())
    cut = tied()
    fully_shard(cut)
    assert fps.select(cut, [batches()[0][0]], budget=fps.PerNeuron(2), progress=False).tied == of_tied.tied
    assert largest_difference(alone(masked, of_tied, tied())[0], together(masked, of_tied, cut)[0]) == 0

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, tuner, _ = together(masked, selection, shard(mixture(), mp_policy=policy))
    found, base = whole(model), whole(mixture())
    for name, w in selection.items():
        assert torch.equal(found[name][~w.mask()], base[name][~w.mask()])
    assert 0 < largest_difference(one, model) < 0.05

    # Gradients are added up here and exchanged once a step.
    sums = []
    for held_back in (True, False):
        model = shard(mixture())
        tuner = fps.attach(model, selection)
        optimizer = sgd(tuner)
        for x, y in batches():
            optimizer.zero_grad()
            for half in range(2):
                part = slice(rank + half * size, None, 2 * size)
                with tuner.no_sync() if held_back and not half else contextlib.nullcontext():
                    (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            optimizer.step()
        sums.append((model, tuner._exchange.bytes_sent))
    assert largest_difference(sums[0][0], sums[1][0]) < 1e-6
    assert largest_difference(sums[0][0], alone(sgd, selection)[0]) < 1e-6
    assert sums[1][1] == 2 * sums[0][1]

    model = shard(mixture())  # the loss's sum instead of its mean
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
    bare = fps.Selection(dict(selection.weights), ())  # Gloo refuses to scale what FSDP reduces itself
    tuner = fps.attach(model, bare)
    x, y = batches()[0]
    F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
    sum_of = {name: p.grad.full_tensor() for name, p in tuner.named_parameters()}
    other = shard(mixture())
    tuner = fps.attach(other, bare)
    F.cross_entropy(other(x[rank::size]), y[rank::size]).backward()
    for name, p in tuner.named_parameters():
        torch.testing.assert_close(sum_of[name], size * p.grad.full_tensor())

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = shard(mixture())
    optimizer = masked(fps.attach(model, selection))
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x[rank::size]), y[rank::size])).backward()
        scaler.step(optimizer)
        scaler.update()
    assert largest_difference(one, model) == 0

    # Nothing as large as a weight is made in the backward pass of a block, where FSDP itself gathers into what it has.
    model = shard(mixture(), reshard_after_forward=False)
    tuner = fps.attach(model, bare)
    F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
    loss = F.cross_entropy(model(x[rank::size]), y[rank::size])
    with Shapes() as shapes:
        loss.backward()
    own = {tuple(p.shape) for name, p in mixture().named_parameters() if name in selection and "grouped" not in name}
    assert not shapes.made & own, shapes.made & own
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    assert set(model.state_dict()) == set(mixture().state_dict())
    tuner.detach()
    with pytest.raises(ValueError, match=r"no_sync\(\) is for sharded models"):
        fps.attach(mixture(), selection).no_sync().__enter__()
    model(x[:2]).sum().backward()  # trained whole again
    again = fps.attach(model, selection)
    model(x[:2]).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    leave()


def test_ways_of_sharding_and_training(tmp_path):
    in_two_processes(ways, tmp_path)


class Sometimes(Mixture):
    """One process leaves out a weight."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x)).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = x + block.attention(x, x, x)[0] if i == 1 and dist.get_rank() == 0 else block(x)
        return self.head(x.mean(1))


def more_processes() -> None:
    rank, size = join()
    selection = chosen()
    assert largest_difference(alone(sgd, selection)[0], together(sgd, selection)[0]) < 1e-6  # sums in another order
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    hybrid = shard(mixture(), mesh=mesh)
    one = fps.select(mixture(), [batches()[0][0]], budget=fps.Global(0.02), process_group=False, progress=False)
    assert fps.select(hybrid, [batches()[0][0]], budget=fps.Global(0.02), progress=False).overlap(one) == 1
    assert largest_difference(alone(sgd, selection)[0], together(sgd, selection, hybrid)[0]) < 1e-6
    three = torch.distributed.new_group([0, 1, 2])
    if rank < 3:  # uneven shares
        mesh = DeviceMesh.from_group(three, "cpu")
        uneven = shard(mixture(), mesh=mesh)
        tuner = fps.attach(uneven, selection)
        optimizer = sgd(tuner)
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(uneven(x[rank::3]), y[rank::3]).backward()
            optimizer.step()
        single = mixture()
        tuner = fps.attach(single, selection)
        optimizer = sgd(tuner)
        for x, y in batches():
            optimizer.zero_grad()
            for part in range(3):
                (F.cross_entropy(single(x[part::3]), y[part::3]) / 3).backward()
            optimizer.step()
        assert largest_difference(single, uneven) < 1e-6
    torch.manual_seed(1)
    model = Sometimes()
    fully_shard(model)
    tuner = fps.attach(model, fps.Selection({name: w for name, w in selection.items() if name != "head.weight"}, ()))
    x, y = batches()[0]
    F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
    part = torch.tensor(0.0)
    gradient = tuner.compact["blocks.1.up.weight"].grad.full_tensor()
    assert gradient.norm() > part  # a mean with the zeros of the first process
    leave()


def test_more_processes(tmp_path):
    in_processes(more_processes, 4, tmp_path)


def refusals() -> None:
    rank, size = join()
    x, y = batches()[0]
    selection = chosen()
    generator = torch.Generator().manual_seed(rank)
    other = fps.select(
        mixture(), [torch.randn(4, 3, 16, 16, generator=generator)], budget=fps.PerNeuron(2), process_group=False
    )
    model = shard(mixture())
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="process 1 of 2 attached another selection than process 0"):
        fps.attach(model, other)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any("_selected" in name for name, _ in model.named_modules())
    model = mixture()
    left_out = model.blocks[0].up.weight
    with pytest.raises(ValueError, match="blocks.0.up.weight is not sharded, while other parameters are"):
        fps.attach(shard(model, ignored_params={left_out}), selection)

    model = shard(mixture())
    tuner = fps.attach(model, selection)
    model.blocks[0].set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="parts of the sharded model add up their gradients and others do not"):
        F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
    model.set_requires_gradient_sync(True)
    values = dict(model.blocks[0].up.named_parameters())
    with pytest.raises(RuntimeError, match="functional calls and transforms of functions take no sharded models"):
        torch.func.functional_call(
            model, {"blocks.0.up.weight_selected.values": values["weight_selected.values"].detach().clone()}, (x,)
        )
    optimizer = masked(tuner)
    model.blocks[0].up = nn.Linear(12, 25)
    with pytest.raises(ValueError, match="blocks.0.up.weight was replaced since attach"):
        optimizer.step()
    leave()


def test_what_is_refused(tmp_path):
    in_two_processes(refusals, tmp_path)
