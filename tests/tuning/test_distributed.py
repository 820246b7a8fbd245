"""``attach`` under DistributedDataParallel: two processes on their halves of a batch equal one on the whole."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fps_kernels as fps
from tests.keeping.test_kept import batch, distance, network
from tests.support.groups import in_two_processes, leave
from tests.support.models import Classifier, images

STEPS, BATCH = 3, 8


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(STEPS, BATCH, 3, 8, 8), torch.randint(5, (STEPS, BATCH))


def model_and_tuner() -> tuple[Classifier, fps.Tuner]:
    torch.manual_seed(4)
    model = Classifier()
    return model, fps.attach(model, fps.select(model, [images()], budget=fps.PerNeuron(2)))


def steps(model: torch.nn.Module, tuner: fps.Tuner, part: slice) -> dict[str, torch.Tensor]:
    optimizer = fps.MaskedAdamW(tuner, lr=1e-2, weight_decay=0.1)
    for x, y in zip(*data(), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in tuner.named_parameters()}


def assert_same_everywhere(found: dict[str, torch.Tensor]) -> None:
    for name, value in found.items():
        others = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(others, value.contiguous())
        assert torch.equal(*others), name


def check_kept_in_8_bits(rank: int) -> None:
    """Each process packs what it keeps itself; gradients are reduced as ever."""
    found = []
    for keep_bits in (None, 8):
        torch.manual_seed(6)
        model = network()
        selection = fps.select(model, [batch()], budget=fps.PerNeuron(2), progress=False)
        tuner = fps.attach(model, selection, keep_bits=keep_bits)
        wrapped = DistributedDataParallel(model)
        wrapped(batch(rank)).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in tuner.named_parameters()})
    assert 0 < distance(found[1], found[0]) < 0.01
    assert_same_everywhere(found[1])


def process() -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    model, tuner = model_and_tuner()
    counted = [0]
    wrapped = DistributedDataParallel(model)

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted[0] += bucket.buffer().numel() * bucket.buffer().element_size()
        reduced = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return reduced.then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, count)
    found = steps(wrapped, tuner, slice(rank, None, 2))
    trained = sum(p.numel() for p in tuner.parameters())
    assert counted[0] == STEPS * 4 * trained, (counted, trained)
    expected_trained = tuner.selection.nnz + sum(p.numel() for p in tuner.dense.values())
    assert trained == expected_trained

    alone, alone_tuner = model_and_tuner()
    expected = steps(alone, alone_tuner, slice(None))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for (key, value), other in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert_same_everywhere(found)
    check_kept_in_8_bits(rank)
    leave()


def test_two_processes_equal_one(tmp_path):
    in_two_processes(process, tmp_path)


def processes_that_differ() -> None:
    """Each chooses for itself, from data of its own."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    torch.manual_seed(4)
    model = Classifier()
    mask = torch.zeros(model.hidden.weight.shape, dtype=torch.bool)
    mask[:, rank] = True  # as many entries, other ones
    fps.attach(model, {"hidden.weight": mask})
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="process 1 of 2 attached another selection than process 0"):
        wrapped(images())
    del wrapped, model
    mask[0, 5 : 5 + rank] = (
        True  # more on one of the two: DDP itself sees that sizes differ, and neither waits for the other
    )
    other = Classifier()
    fps.attach(other, {"hidden.weight": mask})
    with pytest.raises(RuntimeError):
        DistributedDataParallel(other)
    leave()


def test_processes_that_chose_differently_are_refused(tmp_path):
    in_two_processes(processes_that_differ, tmp_path)


def choosing_together() -> None:
    """Each sees its part of the data, and all choose what one process with all of it does."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    torch.manual_seed(4)
    model, x = Classifier(), images(8)
    for scorer in (fps.FPS(), fps.Wanda(), fps.Magnitude(), fps.Random(3)):
        for budget in (fps.PerNeuron(2), fps.Global(0.05)):
            chosen = {"scorer": scorer, "budget": budget, "progress": False}
            together = fps.select(model, [x[rank::2]], **chosen)
            alone = fps.select(model, [x], **chosen, process_group=False)
            assert list(together) == list(alone)
            # Sums in another order may differ in their last bit, and with it ties.
            assert together.overlap(alone) > 0.99 if isinstance(scorer, fps.FPS | fps.Wanda) else True
            sums = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
            flat = torch.cat([w.flat() * (i + 1) for i, w in enumerate(together.values())])
            dist.all_gather(sums, flat.sum().view(1))
            assert sums[0] == sums[1]
    bad = x[rank::2].clone()
    if rank == 1:
        bad[0] = float("nan")
    with pytest.raises(ValueError, match="contain NaN or Inf"):  # on both
        fps.select(model, [bad], progress=False)
    model.eval()
    tuner = fps.attach(model, fps.select(model, [x[rank::2]], progress=False))
    DistributedDataParallel(model)(x[rank::2]).sum().backward()
    assert all(value.grad is not None for value in tuner.parameters())
    leave()


def test_processes_choose_together(tmp_path):
    in_two_processes(choosing_together, tmp_path)


def test_a_group_without_distributed_is_refused():
    with pytest.raises(ValueError, match="process_group was given, but torch.distributed is not initialised"):
        fps.select(Classifier(), [images()], process_group=object())


def the_page() -> None:
    """What docs/how-to/distributed.md shows."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], scope)
    os.chdir(Path(os.environ["FPS_TEST_MEETING"].removeprefix("file://")).parent)
    torch.manual_seed(4)
    model = Classifier()
    dataset = torch.utils.data.TensorDataset(images(16), torch.arange(16) % 5)
    before = copy.deepcopy(model)
    tuner = scope["train"](model, dataset, 2)
    assert_same_everywhere({name: p.detach() for name, p in tuner.named_parameters()})
    dist.barrier()
    fps.load_delta("task.safetensors").apply_(before)
    tuner.detach()
    for (name, p), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(p, other), name
    leave()


def test_the_page_about_several_processes(tmp_path):
    in_two_processes(the_page, tmp_path)


def sharded_before() -> None:
    """Whatever else has cut the weights is named, by each of our functions, and what to do instead."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    whole, x = Classifier(), images()
    selection = fps.select(whole, [x], progress=False)

    def refused(model: torch.nn.Module, message: str, attach: bool = True) -> None:
        functions = [
            lambda: fps.gps_select(model, [(x, torch.zeros(len(x), dtype=torch.int64))], loss="cross_entropy"),
            lambda: fps.masked_parameters(model, selection),
        ]
        if attach:
            functions += [
                lambda: fps.calibrate(model, [x], progress=False),
                lambda: fps.select(model, [x], progress=False),
                lambda: fps.attach(model, selection),
            ]
        for function in functions:
            with pytest.raises(ValueError, match=message) as found:
                function()
            assert "use DistributedDataParallel" in str(found.value)

    sharded = Classifier()
    fully_shard(sharded, mesh=mesh)
    refused(sharded, "position is a DTensor, a weight that fully_shard has cut", attach=False)
    parallel = parallelize_module(Classifier(), mesh, {"hidden": ColwiseParallel()})
    refused(parallel, "hidden.weight is a DTensor, a weight that tensor parallelism has cut")
    flattened = FullyShardedDataParallel(Classifier(), device_id=torch.device("cpu"))
    refused(flattened, "the model is wrapped in FullyShardedDataParallel")
    partitioned = Classifier()
    partitioned.hidden.weight = torch.nn.Parameter(torch.empty(0))
    partitioned.hidden.weight.ds_id = 3  # as DeepSpeed leaves them
    refused(partitioned, "hidden.weight is partitioned by DeepSpeed's ZeRO-3")
    leave()


def test_sharded_models_are_refused(tmp_path):
    in_two_processes(sharded_before, tmp_path)


def sharded_later() -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["FPS_TEST_MEETING"], rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model, tuner = model_and_tuner()
    optimizer = fps.MaskedAdamW(tuner)
    optimizer.step()
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="embed.weight was replaced since attach"):
        model(images())
    with pytest.raises(ValueError, match="was replaced since attach"):
        optimizer.step()
    plain = Classifier()
    masked = fps.MaskedAdamW(fps.masked_parameters(plain, {"hidden.weight": torch.rand(20, 12) < 0.5}))
    fully_shard(plain, mesh=mesh)
    with pytest.raises(ValueError, match="hidden.weight was replaced since masked_parameters"):
        masked.step()

    model, tuner = model_and_tuner()  # whose values are stepped on one process each, and sent to the others through .data
    wrapped = DistributedDataParallel(model)
    shared = ZeroRedundancyOptimizer(list(tuner.parameters()), torch.optim.AdamW, lr=0.1)
    before = model.hidden.weight.detach().clone()
    for x, y in zip(*data(), strict=True):
        F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
        shared.step()
        shared.zero_grad()
    values = tuner.compact["hidden.weight"].detach()
    weight = model.hidden.weight.detach()
    assert torch.equal(weight[tuner.selection["hidden.weight"].mask()], values)
    assert not torch.equal(weight, before)
    others = [torch.empty_like(values) for _ in range(2)]
    dist.all_gather(others, values)
    assert torch.equal(*others)
    leave()


def test_sharding_after_attach(tmp_path):
    in_two_processes(sharded_later, tmp_path)


def test_attach_after_wrapping_is_refused():
    model = Classifier()

    class Wrapped(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module) -> None:
            torch.nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="before it is wrapped in DistributedDataParallel"):
        fps.attach(Wrapped(model), {"module.hidden.weight": torch.ones(20, 12, dtype=torch.bool)})
