"""timm's optimizer factory, transformers' Trainer and Lightning, each with a choice that is tuned."""

import copy

import lightning
import pytest
import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fps_kernels as fps
from fps_kernels.integrations.lightning import TuneSelected
from fps_kernels.integrations.timm import register
from fps_kernels.integrations.transformers import SaveDelta, masked_adamw
from tests.support.training import assert_only_selected_moved, copy_of

FAMILIES = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 28, "depths": (2,), "embed_dim": 24, "num_heads": (3,)}),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_timm_train_loop(family):
    """What timm's train.py does with an optimizer: factory with layer decay, scheduler, mixup, averaging."""
    name, options = FAMILIES[family]
    size = options.get("img_size", 32)
    model = timm.create_model(name, num_classes=5, **options)
    data = torch.randn(8, 3, size, size)
    selection = fps.select(model, [data], budget=fps.PerTensor(0.05))
    before = copy_of(model)
    tuner = fps.attach(model, selection)
    optimizer = timm.optim.create_optimizer_v2(model, opt=register(), lr=0.05, weight_decay=0.1, layer_decay=0.8)
    assert isinstance(optimizer, fps.MaskedAdamW)
    assert register() == "maskedadamw"  # a second time
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in tuner.parameters()}
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=1e-3)
    mixup = timm.data.Mixup(mixup_alpha=0.2, num_classes=5)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    loss_fn = timm.loss.SoftTargetCrossEntropy()
    for epoch in range(3):
        x, y = mixup(data, torch.arange(8) % 5)
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        schedule.step(epoch + 1)
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


class Samples(torch.utils.data.Dataset):
    def __init__(self, samples: list[dict[str, torch.Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def vit() -> tuple[nn.Module, Samples]:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % 3)} for i in range(8)]
    return transformers.ViTForImageClassification(config), Samples(samples)


def bert() -> tuple[nn.Module, Samples]:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
    )
    samples = [{"input_ids": torch.randint(30, (9,)), "labels": torch.tensor(i % 3)} for i in range(8)]
    return transformers.BertForSequenceClassification(config), Samples(samples)


@pytest.mark.parametrize("make", [vit, bert])
def test_transformers_trainer(tmp_path, make):
    model, data = make()
    base = copy.deepcopy(model)
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    selection = fps.select(model, [batch], budget=fps.PerNeuron(2))
    before = copy_of(model)
    tuner = fps.attach(model, selection)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.05,
        weight_decay=0.1,
        adam_beta1=0.8,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = masked_adamw(tuner, args)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.1}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    trainer = transformers.Trainer(
        model, args, optimizers=(optimizer, None), train_dataset=data, callbacks=[SaveDelta(tuner)]
    )
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "delta.safetensors").is_file()
    tuner.detach()
    assert_only_selected_moved(model, before, selection)
    fps.load_delta(tmp_path / "delta.safetensors").apply_(base)
    assert all(torch.equal(p, q) for p, q in zip(base.state_dict().values(), model.state_dict().values(), strict=True))


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return fps.MaskedAdamW([p for p in self.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


def test_lightning(tmp_path):
    module = Classifier()
    base, before = copy.deepcopy(module), copy_of(module)
    loader = DataLoader(TensorDataset(torch.randn(12, 12), torch.arange(12) % 3), batch_size=4)
    tuning = TuneSelected(lambda m: fps.select(m, loader, budget=fps.PerNeuron(2)), delta=tmp_path / "task.safetensors")
    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[tuning],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    selection = tuning.tuner.selection
    tuning.tuner.detach()
    assert_only_selected_moved(module, before, selection)
    fps.load_delta(tmp_path / "task.safetensors").apply_(base)
    assert torch.equal(base.body.weight, module.body.weight)


def test_lightning_holds_the_statistics_of_batch_norms(tmp_path):
    module = Classifier()
    module.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
    base, x = copy.deepcopy(module).eval(), torch.randn(12, 12) + 1
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=4)
    tuning = TuneSelected(lambda m: fps.select(m, loader, budget=fps.PerNeuron(2)), delta=tmp_path / "task.safetensors")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=2, callbacks=[tuning], accelerator="cpu", **quiet).fit(module, loader)
    fps.load_delta(tmp_path / "task.safetensors").apply_(base)
    assert torch.equal(base(x), module.eval()(x))
    assert base.body[1].num_batches_tracked == 6


@pytest.mark.parametrize("order", [1, -1], ids=["choice first", "average first"])
@pytest.mark.parametrize(
    "average",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        lambda: WeightAveraging(avg_fn=lambda mean, new, count: 0.5 * mean + 0.5 * new),
    ],
    ids=["stochastic", "exponential"],
)
def test_lightning_averages_what_is_tuned(tmp_path, average, order):
    """The averages are in the module at the end, and what is saved is them."""
    module = Classifier()
    base = copy.deepcopy(module)
    loader = DataLoader(TensorDataset(torch.randn(12, 12), torch.arange(12) % 3), batch_size=4)
    tuning = TuneSelected(lambda m: fps.select(m, loader, budget=fps.PerNeuron(2)), delta=tmp_path / "task.safetensors")
    trainer = lightning.Trainer(
        max_epochs=3,
        callbacks=[tuning, average()][::order],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    tuned = copy.deepcopy(base)
    fps.load_delta(tmp_path / "task.safetensors").apply_(tuned)
    final = module.state_dict()
    assert all(torch.equal(p, final[name]) for name, p in tuned.state_dict().items())
    assert not torch.equal(tuned.body.weight, base.body.weight)
