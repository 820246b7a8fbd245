"""transformers' Trainer and accelerate's FSDP2 in two processes."""

import os
import types
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed as dist

import fps_kernels as fps
from fps_kernels.integrations.transformers import SaveDelta, masked_adamw
from tests.integrations.test_trainers import vit
from tests.support.groups import leave, under_torchrun
from tests.support.sharding import batches, largest_difference, mixture, whole

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "transformers.md"


def trainer() -> None:
    folder = os.environ["FPS_TEST_FOLDER"]
    args = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.05,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    )
    torch.manual_seed(3)
    model, data = vit()
    base, _ = vit()
    base.load_state_dict(model.state_dict())
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == 2
    mine = {key: torch.stack([sample[key] for sample in data][rank::size]) for key in data[0]}
    tuner = fps.attach(model, fps.select(model, [mine], budget=fps.PerNeuron(2), progress=False))
    transformers.Trainer(
        model, args, optimizers=(masked_adamw(tuner, args), None), train_dataset=data, callbacks=[SaveDelta(tuner)]
    ).train()
    dist.barrier()
    assert Path(folder, "checkpoint-2", "delta.safetensors").is_file()
    fps.load_delta(f"{folder}/delta.safetensors").apply_(base)
    tuner.detach()
    for (name, p), q in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(p, q), name  # also of the process that did not write the file
    leave()


def test_trainer_under_torchrun(tmp_path):
    under_torchrun(trainer, 2, tmp_path)


def fsdp2() -> None:
    """What the page shows. Without a GPU Accelerator itself takes DistributedDataParallel: what it calls is called here."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    accelerate.PartialState(cpu=True)
    rank, size = dist.get_rank(), dist.get_world_size()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator: Any = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
        torch_device_mesh=None,
        parallelism_config=None,
        prepare_optimizer=lambda optimizer: optimizer,
    )
    code = PAGE.read_text().split("```python\n")[-1].partition("```")[0]
    scope: dict[str, Any] = {"fps": fps}
    exec(code, scope)
    x = batches()[0][0]
    model, tuner, optimizer = scope["prepare"](accelerator, mixture(), [x[rank::size]])
    alone = mixture()
    single = fps.attach(alone, tuner.selection)
    other = fps.MaskedAdamW(single, lr=1e-3)
    for images, labels in batches():
        optimizer.zero_grad()
        other.zero_grad()
        F.cross_entropy(model(images[rank::size]), labels[rank::size]).backward()
        for part in range(size):
            (F.cross_entropy(alone(images[part::size]), labels[part::size]) / size).backward()
        optimizer.step()
        other.step()
    assert largest_difference(model, alone) == 0
    assert whole(model)
    leave()


def test_fsdp2_of_accelerate(tmp_path):
    under_torchrun(fsdp2, 2, tmp_path)
