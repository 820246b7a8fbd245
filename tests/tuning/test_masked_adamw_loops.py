"""``MaskedAdamW`` in everyone's training loops: schedulers, scalers, accelerate, timm, transformers."""

import copy

import torch

import fps_kernels as fps
from tests.support.models import Classifier, labelled
from tests.support.training import (
    RATES,
    MaskedByHand,
    assert_only_selected_moved,
    copy_of,
    loss_of,
    selected,
    selected_like,
    train,
)


def test_groups_options_and_schedulers():
    model = Classifier()
    selection = selected(model)

    def options(name, p):
        return {"lr": 1e-2 if name.startswith("head") else 1e-3, "weight_decay": 0.0 if p.dim() == 1 else 0.1}

    groups = fps.masked_parameters(model, selection, options=options)
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups) == [
        (1e-3, 0.0, 2),
        (1e-3, 0.1, 3),
        (1e-2, 0.0, 1),
        (1e-2, 0.1, 1),
    ]
    optimizer = fps.MaskedAdamW(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    twin = copy.deepcopy(model)
    by_hand = MaskedByHand(twin, selection)
    by_hand.inner = torch.optim.AdamW(
        [{"params": [v], **options(n, twin.get_parameter(n))} for n, v in by_hand.values.items()], foreach=False
    )
    other_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(by_hand.inner, T_max=4)
    for _ in range(4):
        batch = labelled()
        train(model, optimizer, [batch])
        train(twin, by_hand, [batch])
        schedule.step()
        other_schedule.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_closure_and_gradient_clipping():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    batch = labelled()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


def test_grad_scaler_skips_steps_with_infinite_gradients():
    model = Classifier()
    before = copy_of(model)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = labelled()
    scaler.scale(loss_of(model, batch)).backward()
    model.hidden.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert scaler.get_scale() == 2.0**9

    twin = copy.deepcopy(model)
    plain = fps.MaskedAdamW(fps.masked_parameters(twin, selected_like(optimizer, model)), **RATES)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch)).backward()
    scaler.step(optimizer)
    train(twin, plain, [batch])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Classifier()
    before, selection = copy_of(model), selected(model)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*labelled(24)), batch_size=6)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(prepared):
            optimizer.zero_grad()
            accelerator.backward(loss_of(prepared, batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
    assert_only_selected_moved(model, before, selection)


def test_timm():
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler

    model = Classifier()
    before, selection = copy_of(model), selected(model)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    schedule = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1)
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, labelled())
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        average.update(model)
        schedule.step(step + 1)
    assert_only_selected_moved(model, before, selection)
    assert not torch.equal(average.module.head.weight, model.head.weight)


def test_transformers(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(12)]
    batch = torch.stack([row["pixel_values"] for row in rows])
    selection = fps.select(model, [{"pixel_values": batch}], budget=fps.PerNeuron(2))
    before = copy_of(model)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, save_steps=3
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    assert_only_selected_moved(model, before, selection)
