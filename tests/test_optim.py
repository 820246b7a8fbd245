"""``MaskedAdamW``: unselected entries keep their bits, selected ones follow torch.optim.AdamW, in every training loop."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.selection import Selection
from tests.models import Classifier, images, labelled

RATES = {"lr": 3e-3, "weight_decay": 0.1}


def selected(model: nn.Module, density: float = 0.1) -> Selection:
    return fps.select(model, [images()], budget=fps.PerTensor(density))


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)).float(), batch[1])


def train(model: nn.Module, optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def assert_only_selected_moved(model: nn.Module, before: dict[str, torch.Tensor], selection: Selection) -> None:
    masks = selection.masks()
    for name, p in model.named_parameters():
        moved = p != before[name]
        if name in masks:
            assert not moved[~masks[name]].any(), name
            assert moved[masks[name]].any(), name
        else:
            assert bool(moved.any()) == (name in selection.dense), name


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class MaskedByHand:
    """torch.optim.AdamW on copies of the chosen entries: what MaskedAdamW must equal."""

    def __init__(self, model: nn.Module, selection: Selection, **rates) -> None:
        self.model, self.masks = model, {**selection.masks()}
        for name in selection.dense:
            self.masks[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        self.values = {n: nn.Parameter(model.get_parameter(n).detach()[m].clone()) for n, m in self.masks.items()}
        self.inner = torch.optim.AdamW(self.values.values(), foreach=False, **rates)

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        for name, value in self.values.items():
            value.grad = self.model.get_parameter(name).grad[self.masks[name]]
        self.inner.step()
        with torch.no_grad():
            for name, value in self.values.items():
                self.model.get_parameter(name)[self.masks[name]] = value


@pytest.mark.parametrize("maximize", [False, True])
def test_follows_torch_adamw_and_leaves_the_rest_alone(maximize):
    model = Classifier()
    twin, before, selection = copy.deepcopy(model), copy_of(model), selected(model)
    batches = [labelled() for _ in range(5)]
    rates = RATES | {"maximize": maximize, "betas": (0.8, 0.95), "eps": 1e-6}
    train(model, fps.MaskedAdamW(fps.masked_parameters(model, selection), **rates), batches)
    train(twin, MaskedByHand(twin, selection, **rates), batches)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert_only_selected_moved(model, before, selection)


def test_state_is_compact():
    model = Classifier()
    selection = selected(model, 0.05)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selection), **RATES)
    train(model, optimizer, [labelled()])
    for name, entries in selection.items():
        state = optimizer.state[model.get_parameter(name)]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == entries.nnz


def test_plain_masks():
    model = Classifier()
    before = copy_of(model)
    masks = {"hidden.weight": model.hidden.weight.abs() > 0.2, "norm.bias": torch.arange(12) < 4}
    train(model, fps.MaskedAdamW(fps.masked_parameters(model, masks), **RATES), [labelled() for _ in range(3)])
    assert_only_selected_moved(model, before, Selection.from_masks(masks))


def test_plain_parameters_are_tuned_whole():
    model = Classifier()
    twin = copy.deepcopy(model)
    batches = [labelled() for _ in range(4)]
    train(model, fps.MaskedAdamW(model.parameters(), **RATES), batches)
    train(twin, torch.optim.AdamW(twin.parameters(), **RATES), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_float32_masters(dtype):
    """A thousand steps that are each too small for the weight's own dtype add up in the master."""
    model = nn.Linear(4, 3, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, {"weight": torch.eye(3, 4).bool()}), lr=1e-5, weight_decay=0)
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(state["master"], torch.full((3,), 0.99), rtol=0, atol=1e-4)
    assert torch.equal(model.weight.diagonal(), state["master"].to(dtype))
    assert (model.weight[~torch.eye(3, 4).bool()] == 1).all()


def test_convolutions_in_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 5))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    before = copy_of(twin)
    selection = fps.select(model, [images()], budget=fps.PerTensor(0.1))
    batches = [labelled() for _ in range(3)]
    for m in (model, twin):
        train(m, fps.MaskedAdamW(fps.masked_parameters(m, selection), **RATES), batches)
    assert not twin[0].weight.is_contiguous()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_only_selected_moved(twin, before, selection)


@pytest.mark.parametrize(("weight_last", "grad_last"), [(True, False), (False, True)])
def test_gradients_of_another_memory_format(weight_last, grad_last):
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    weight, grad = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    mask = torch.rand(6, 4, 3, 3) < 0.3
    got = []
    for last, gradient_last in ((False, False), (weight_last, grad_last)):
        p = nn.Parameter(weight.clone().to(memory_format=formats[last]))
        p.grad = grad.to(memory_format=formats[gradient_last])
        module = nn.Module()
        module.register_parameter("w", p)
        fps.MaskedAdamW(fps.masked_parameters(module, {"w": mask}), **RATES).step()
        got.append(p.detach())
    assert torch.equal(*got)


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


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype, capturable):
    model = Classifier().to(dtype)
    selection = fps.select(model, [images().to(dtype)], budget=fps.PerTensor(0.1))
    batches = [labelled() for _ in range(6)]

    def optimizer_of(m):
        rates = RATES | {"lr": torch.tensor(3e-3)} if capturable else RATES
        return fps.MaskedAdamW(fps.masked_parameters(m, selection), capturable=capturable, **rates)

    optimizer = optimizer_of(model)
    train(model, optimizer, batches[:3])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, batches[3:])

    resumed = Classifier().to(dtype)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)  # the state holds tensors and numbers only
    resumed.load_state_dict(saved["model"])
    again = optimizer_of(resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, batches[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(value, again.state[q][key])
            assert value.dtype == again.state[q][key].dtype == torch.float32


def test_state_of_another_selection_is_refused():
    model = Classifier()
    a, b = (
        fps.MaskedAdamW(fps.masked_parameters(model, fps.select(model, [images()], scorer=fps.Random(seed))))
        for seed in (1, 2)
    )
    train(model, a, [labelled()])
    with pytest.raises(ValueError, match="state is of another selection"):
        b.load_state_dict(a.state_dict())
    assert not b.state


def test_deep_copies_are_independent():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    train(model, optimizer, [labelled()])
    twin_model, twin = copy.deepcopy((model, optimizer))
    batch = labelled()
    train(model, optimizer, [batch])
    train(twin_model, twin, [batch])
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_parameters_that_move_in_memory():
    """``.to()`` and ``.data =`` replace the memory of a parameter; the optimizer must follow."""
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    train(model, optimizer, [labelled()])
    for p in model.parameters():
        p.data = p.data.clone()
    before = copy_of(model)
    train(model, optimizer, [labelled()])
    assert_only_selected_moved(model, before, selected_like(optimizer, model))


def selected_like(optimizer: fps.MaskedAdamW, model: nn.Module) -> Selection:
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: entries for p, entries in optimizer.selections().items()}
    partial = {n: e for n, e in found.items() if e.density < 1}
    return Selection(partial, tuple(n for n in found if n not in partial))


def test_gradients_that_are_missing_are_skipped():
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    before = copy_of(model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.hidden.weight.grad = torch.ones_like(model.hidden.weight)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"hidden.weight"}


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


def test_saved_activations_notice_the_update():
    """The step bumps the version of the weights, so that a backward through stale values is an error and not a lie."""
    model = Classifier()
    optimizer = fps.MaskedAdamW(fps.masked_parameters(model, selected(model)), **RATES)
    loss = loss_of(model, labelled())
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


def test_bad_input():
    model = Classifier()
    selection = selected(model)
    groups = fps.masked_parameters(model, selection)
    for kwargs, match in (
        ({"lr": -1.0}, "lr must not be negative"),
        ({"lr": float("nan")}, "lr must not be negative"),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ):
        with pytest.raises(ValueError, match=match):
            fps.MaskedAdamW(groups, **kwargs)
    with pytest.raises(ValueError, match="another model: this one has no parameter"):
        fps.masked_parameters(nn.Linear(3, 3), selection)
    with pytest.raises(ValueError, match="the selection is empty"):
        fps.masked_parameters(model, {})
    with pytest.raises(ValueError, match="embed.weight is selected but does not require gradients"):
        frozen = Classifier()
        frozen.embed.requires_grad_(False)
        fps.masked_parameters(frozen, selection)
    with pytest.raises(TypeError, match=r"params\[0\] must be float32, bfloat16 or float16, got torch.float64"):
        fps.MaskedAdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"has shape \[20, 12\], its selection is for \[12, 20\]"):
        fps.MaskedAdamW([{"params": [model.hidden.weight], "selections": [selection["out.weight"]]}])
    with pytest.raises(ValueError, match="sparse"):
        embedding = nn.Embedding(4, 3, sparse=True)
        optimizer = fps.MaskedAdamW(embedding.parameters())
        embedding(torch.tensor([1])).sum().backward()
        optimizer.step()


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
