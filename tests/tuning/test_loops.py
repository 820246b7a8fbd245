"""``attach`` inside real training loops: precision, checkpointing, averaging, compilers, trainers, other optimizers."""

import copy
import io

import pytest
import schedulefree
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps
from tests.support.models import Classifier, images, labelled
from tests.support.tolerances import assert_sums_close
from tests.support.training import RATES, assert_only_selected_moved, copy_of, loss_of, selected, train


def gradients(tuner: fps.Tuner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in tuner.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_sums_close(value, expected[name], relative, name)


def attached(model: nn.Module, **kwargs) -> tuple[fps.Tuner, fps.MaskedAdamW]:
    tuner = fps.attach(model, selected(model))
    return tuner, fps.MaskedAdamW(tuner, **RATES, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype):
    """16-bit gradients are as near to float64 as those of the dense weight are, within a factor of three."""
    model, batch = Classifier(), labelled()
    exact = copy.deepcopy(model).double()
    F.cross_entropy(exact(batch[0].double()), batch[1]).backward()
    selection = selected(model)
    masks = selection.masks()

    def run(m):
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(m(batch[0]).float(), batch[1])

    run(model).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tuner = fps.attach(model, selection)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    scaler.scale(run(model)).backward()
    for name, p in tuner.compact.items():
        truth = exact.get_parameter(name).grad[masks[name]]
        typical = float((dense[name][masks[name]] - truth).norm()) + 1e-3 * float(truth.norm())
        assert float((p.grad / 2**6 - truth).norm()) <= 3 * typical, name

    optimizer = fps.MaskedAdamW(tuner, **RATES)
    before = copy_of(model)
    tuner.compact["hidden.weight"].grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    scaler.scale(run(model)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
    scaler.step(optimizer)
    assert not torch.equal(tuner.compact["hidden.weight"], before["hidden.weight_selected.values"])


class Checkpointed(nn.Module):
    def __init__(self, inner: Classifier, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        m = self.inner
        x = m.embed(x).flatten(2).transpose(1, 2) + m.position
        x = x + checkpoint(lambda y: m.out(F.gelu(m.hidden(m.norm(y)))), x, use_reentrant=self.reentrant)
        x = checkpoint(lambda y: F.gelu(m.norm(y)), x, use_reentrant=self.reentrant)
        return m.head(m.out(F.pad(x, (0, 8))).mean(1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, batch = Classifier(), labelled()
    tuner = fps.attach(model, selected(model))
    plain = Checkpointed(model, reentrant)
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    found = gradients(tuner)
    model.zero_grad()
    x = model.embed(batch[0]).flatten(2).transpose(1, 2) + model.position
    x = F.gelu(model.norm(x + model.out(F.gelu(model.hidden(model.norm(x))))))
    F.cross_entropy(model.head(model.out(F.pad(x, (0, 8))).mean(1)), batch[1]).backward()
    assert_close(found, gradients(tuner))


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_checkpointing_and_drop_path(family):
    depth = {"depth": 2} if "vit" in family else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(family, num_classes=3, drop_path_rate=0.2, **depth).train()
    x = torch.randn(2, 3, 224, 224)
    tuner = fps.attach(model, fps.select(model, [x], budget=fps.PerNeuron(2)))
    found = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        found.append(gradients(tuner))
    assert_close(*found, relative=1e-4)


def test_accumulation_and_clipping():
    model = Classifier()
    tuner = fps.attach(model, selected(model))
    x, y = labelled(8)
    F.cross_entropy(model(x), y).backward()
    whole = gradients(tuner)
    model.zero_grad()
    for part in range(4):
        (F.cross_entropy(model(x[part::4]), y[part::4]) / 4).backward()
    assert_close(gradients(tuner), whole)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    expected = torch.stack([g.norm() for g in whole.values()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)  # the chosen gradients only


def test_timm_loop():
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3, NativeScaler

    model = Classifier(classes=4)
    before = copy_of(model)
    tuner, optimizer = attached(model)
    selection = tuner.selection
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    mixup, criterion = Mixup(mixup_alpha=0.8, num_classes=4, label_smoothing=0.1), SoftTargetCrossEntropy()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        x, y = mixup(torch.randn(6, 3, 8, 8), torch.randint(4, (6,)))
        optimizer.zero_grad()
        scaler(criterion(model(x), y), optimizer, clip_grad=1.0, parameters=model.parameters())
        average.update(model)
        for key, value in model.state_dict().items():
            expected[key].lerp_(value, 0.5)
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
    x = images()
    plain = Classifier(classes=4)
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average.module(x), plain(x))  # the averaged copy computes with the averages
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


def test_layer_decay_groups_find_the_layer_of_every_value():
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=3)
    tuner = fps.attach(model, fps.select(model, [torch.randn(1, 3, 224, 224)]))
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, p in tuner.named_parameters():
        owner = model.get_parameter(name)
        layer = 4 if "head" in name else 0 if "patch" in name else 1 + int(name.split(".")[1])
        assert scales[id(p)] == 0.5 ** (4 - layer), (name, owner.shape)
    optimizer = fps.MaskedAdamW(groups, lr=1e-3)
    model(torch.randn(2, 3, 224, 224)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda p: fps.MaskedAdamW(p, **RATES), lambda p: torch.optim.AdamW(p, **RATES)])
def test_resumes_with_the_same_bits(dtype, make):
    model = Classifier().to(dtype)
    fresh = copy.deepcopy(model)
    selection = fps.select(model, [images().to(dtype)], budget=fps.PerTensor(0.1))
    batches = [labelled() for _ in range(6)]
    tuner = fps.attach(model, selection)
    optimizer = make(tuner.parameters())
    train(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "tuner": tuner.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, batches[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = fps.attach(fresh, selection)
    resumed = make(again.parameters())
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["tuner"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, batches[3:])
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    for name, p in tuner.compact.items():
        assert torch.equal(again.compact[name], p), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    model, batch = Classifier(), labelled()
    tuner = fps.attach(model, selected(model))
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    loss_of(model, batch).backward()
    expected = gradients(tuner)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer.zero_grad()
    F.cross_entropy(compiled(batch[0]), batch[1]).backward()
    assert_close(gradients(tuner), expected)
    before = compiled(batch[0]).detach()
    optimizer.step()
    after = compiled(batch[0]).detach()
    assert not torch.equal(before, after)  # the compiled model computes with the tuned values
    torch.testing.assert_close(after, model(batch[0]).detach())


@pytest.mark.parametrize("name", ["vit", "torchvision vit", "transformers BERT"])
def test_compile_of_real_models(name):
    from tests.choosing.test_models import MODELS
    from tests.tuning.test_models import outputs

    model, batch = MODELS[name]()
    model.eval()
    tuner = fps.attach(model, fps.select(model, [batch], budget=fps.PerNeuron(2)))
    outputs(model, batch).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in tuner.compact.items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs(compiled, batch).square().sum().backward()
    assert_close({n: p.grad.clone() for n, p in tuner.compact.items()}, expected, relative=1e-4)


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Classifier()
    before, selection = copy_of(model), selected(model)
    tuner = fps.attach(model, selection)
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*labelled(24)), batch_size=6)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(prepared):
            optimizer.zero_grad()
            accelerator.backward(loss_of(prepared, batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
    accelerator.save_state(str(tmp_path))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer, [labelled()])
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for name, p in tuner.compact.items():
        assert torch.equal(p.detach(), state[name][selection.masks()[name]])
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


@pytest.mark.parametrize("given", [True, False], ids=["MaskedAdamW", "the trainer's own optimizer"])
def test_transformers_trainer(tmp_path, given):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(12)]
    batch = torch.stack([row["pixel_values"] for row in rows])
    selection = fps.select(model, [{"pixel_values": batch}], budget=fps.PerNeuron(2))
    before = copy_of(model)
    tuner = fps.attach(model, selection)
    optimizers = (None, None)
    if given:
        optimizer = fps.MaskedAdamW(tuner, **RATES)
        optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, save_steps=3
    )
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=optimizers).train()
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-6")
    tuned = model.state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in loaded.state_dict().items())
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
    ],
)
def test_other_optimizers(make):
    model, batch = Classifier(), labelled()
    before, selection = copy_of(model), selected(model)
    tuner = fps.attach(model, selection)
    optimizer = make(list(tuner.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(3):
        last = optimizer.step(closure)
    assert last < first
    for name, p in tuner.compact.items():
        assert torch.equal(model.get_parameter(name).detach()[selection.masks()[name]], p.detach())
    tuner.detach()
    assert_only_selected_moved(model, before, selection)


def test_schedule_free():
    """Its train() and eval() exchange the values between steps: the next forward pass, or state_dict, follows."""
    model, batch = Classifier(), labelled()
    tuner = fps.attach(model, selected(model))
    optimizer = schedulefree.AdamWScheduleFree(tuner.parameters(), lr=1e-2)
    optimizer.train()
    train(model, optimizer, [batch] * 3)
    training = model(batch[0]).detach()
    optimizer.eval()
    assert not torch.equal(model(batch[0]), training)
    for name, p in tuner.compact.items():
        assert torch.equal(model.state_dict()[name][tuner.selection.masks()[name]], p.detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: fps.MaskedAdamW(p, lr=0.1),
    ],
    ids=["SGD", "AdamW", "MaskedAdamW"],
)
def test_optimizers_that_step_in_the_backward_pass(make):
    """One for each parameter, so that no gradient lives longer than its step: the same bits as steps after it."""

    def run(in_backward: bool) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(base)
        tuner = fps.attach(model, selection)
        optimizers = {p: make([p]) for p in tuner.parameters()}

        def step(p: torch.Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        if in_backward:
            for p in optimizers:
                p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(x).square().mean().backward()
            if not in_backward:
                for p in optimizers:
                    step(p)
        tuner.detach()
        return copy_of(model)

    base, x = Classifier(), images()
    selection = fps.select(base, [x], budget=fps.PerNeuron(2))
    after, inside = run(False), run(True)
    assert all(torch.equal(inside[name], value) for name, value in after.items())
    assert any(not torch.equal(inside[name], p) for name, p in base.named_parameters())
