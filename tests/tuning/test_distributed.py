"""``attach`` under DistributedDataParallel: two processes on their halves of a batch equal one on the whole."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import fps_kernels as fps
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
    for value in found.values():
        others = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(others, value.contiguous())
        assert torch.equal(*others)
    dist.destroy_process_group()
    # Gloo's threads end with the last reference to the group, and the wrapper, which has one, is part of a cycle. Threads
    # that outlive the interpreter and still hold Python objects abort the process.
    del wrapped
    gc.collect()


def test_two_processes_equal_one(tmp_path):
    environment = {**os.environ, "FPS_TEST_MEETING": f"file://{tmp_path}/meeting"}
    command = [sys.executable, "-c", "from tests.tuning.test_distributed import process; process()"]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(command, cwd=root, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for child in running:
        _, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors


def test_attach_after_wrapping_is_refused():
    model = Classifier()

    class Wrapped(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module) -> None:
            torch.nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="before it is wrapped in DistributedDataParallel"):
        fps.attach(Wrapped(model), {"module.hidden.weight": torch.ones(20, 12, dtype=torch.bool)})
