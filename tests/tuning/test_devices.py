"""Training on a device ends where training on the CPU does, whatever it is done with."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fps_kernels as fps
from tests.support.models import Classifier, labelled
from tests.support.training import RATES, copy_of, loss_of, selected, train

# Sums in another order, through three steps: what a gradient differs by, a moment and an update do.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


class Mixed(nn.Module):
    """A strided convolution, cross-attention by a packed weight, words of which one is padding, a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4, groups=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        words = self.words((x[:, 0, :2, :2].flatten(1) * 7).long().remainder(20))
        x = F.gelu(self.grouped(F.relu(self.embed(x)))).flatten(2).mT
        return self.out(self.attention(words, x, x, need_weights=False)[0].mean(1))


MODELS = {"classifier": Classifier, "mixed": Mixed}


def pair(kind: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """The same model on the CPU and on the device, with one choice of entries."""
    here = MODELS[kind]().to(dtype)
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in here.named_parameters() if p.dim() > 1 and n != "position"}
    return here, copy.deepcopy(here).to(device), fps.Selection.from_masks(masks)


def batches(device: torch.device, count: int = 3) -> tuple[list, list]:
    made = [labelled() for _ in range(count)]
    return made, [tuple(t.to(device) for t in batch) for batch in made]


def assert_same(here: nn.Module, there: nn.Module, **bounds: float) -> None:
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(
            q.detach().cpu(), p.detach(), **(bounds or CLOSE), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_attach_and_masked_adamw(device, kind, zero_grads):
    here, there, selection = pair(kind, device)
    before = copy_of(there)
    for model, data in zip((here, there), batches(device), strict=True):
        tuner = fps.attach(model, selection)
        optimizer = fps.MaskedAdamW(tuner, zero_grads=zero_grads, **RATES)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for batch in data:
            if not zero_grads:
                optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            scheduler.step()
        tuner.detach()
    assert_same(here, there)
    for name, entries in selection.items():
        mask = entries.mask().to(device)
        moved = there.get_parameter(name).detach() != before[name]
        assert not moved[~mask].any(), name
        assert moved[mask].any(), name


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_entries(device, kind):
    """Close to 1e-5 of their size, before any optimizer makes signs of them."""
    here, there, selection = pair(kind, device)
    found = []
    for model, data in zip((here, there), batches(device, 1), strict=True):
        tuner = fps.attach(model, selection)
        loss_of(model, data[0]).backward()
        found.append({name: p.grad.cpu() for name, p in tuner.compact.items()})
    for name, expected in found[0].items():
        assert float((found[1][name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-9, name


def test_dense_gradients_and_parameters_that_are_tuned_whole(device):
    here, there, selection = pair("classifier", device)
    for model, data in zip((here, there), batches(device), strict=True):
        groups = fps.masked_parameters(model, selection)
        whole = [p for n, p in model.named_parameters() if n not in selection]
        train(model, fps.MaskedAdamW([*groups, {"params": whole}], **RATES), data)
    assert_same(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(device, dtype):
    """Values are float32 masters; layers round as the device's matrix products do."""
    here, there, selection = pair("classifier", device, dtype)
    values = []
    for model, data in zip((here, there), batches(device), strict=True):
        tuner = fps.attach(model, selection)
        train(model, fps.MaskedAdamW(tuner, lr=1e-4), data)
        values.append({name: p.detach().cpu() for name, p in tuner.compact.items()})
        for name, p in tuner.compact.items():
            held = model.get_parameter(name).detach()[selection[name].mask().to(device)]
            assert torch.equal(held, p.detach().to(dtype)), name
    for name, expected in values[0].items():
        torch.testing.assert_close(values[1][name], expected, rtol=0, atol=3 * 2e-4)  # three steps of 1e-4, either way


@pytest.mark.parametrize("create", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_of_torch(device, create):
    here, there, selection = pair("classifier", device)
    for model, data in zip((here, there), batches(device), strict=True):
        train(model, create(fps.attach(model, selection).parameters(), lr=1e-2), data)
    assert_same(here, there)


def test_grad_scaler_skips_a_step_with_infinite_gradients(device):
    model = Classifier().to(device)
    tuner = fps.attach(model, selected(model))
    optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    batch = labelled(device=device)
    for number in range(4):
        before = {name: p.detach().clone() for name, p in tuner.compact.items()}
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch) * (float("inf") if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        still = all(torch.equal(p, before[name]) for name, p in tuner.compact.items())
        assert still == (number == 2)
    assert scaler.get_scale() == 128.0


def test_autocast_and_checkpointing(device):
    model, batch = Classifier().to(device), labelled(device=device)
    twin = copy.deepcopy(model)
    selection = selected(model)
    grads = []
    for one, again in ((model, False), (twin, True)):
        tuner = fps.attach(one, selection)
        with torch.autocast(device.type, torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(one, batch[0], use_reentrant=False) if again else one(batch[0])
        F.cross_entropy(y.float(), batch[1]).backward()
        grads.append({name: p.grad for name, p in tuner.compact.items()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_a_checkpoint_is_resumed_with_the_same_bits(device):
    """Model, values and optimizer, through files, in the middle of a run."""
    model, data = Classifier().to(device), batches(device, 4)[1]
    base = copy.deepcopy(model)
    selection = selected(model)
    tuner = fps.attach(model, selection)
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    train(model, optimizer, data[:2])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "tuner": tuner.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[2:])
    again = fps.attach(base, selection)
    resumed = fps.MaskedAdamW(again, **RATES)
    file.seek(0)
    state = torch.load(file)
    base.load_state_dict(state["model"])
    again.load_state_dict(state["tuner"])
    resumed.load_state_dict(state["optimizer"])
    train(base, resumed, data[2:])
    assert_same(model.cpu(), base, rtol=0, atol=0)


def test_what_others_write_is_followed(device):
    """A weight through ``.data``, values by hand, and a model that is moved away and back."""
    model = Classifier().to(device)
    tuner = fps.attach(model, selected(model))
    name = "hidden.weight"
    mask = tuner.selection[name].mask().to(device)
    model.hidden.weight.data.mul_(2)
    assert torch.equal(tuner.compact[name].detach(), model.hidden.weight.detach()[mask])
    with torch.no_grad():
        tuner.compact[name].fill_(0.5)
    assert bool((model.state_dict()[name][mask] == 0.5).all())
    model.cpu()
    train(model, fps.MaskedAdamW(tuner, **RATES), [labelled()])
    model.to(device)
    train(model, fps.MaskedAdamW(tuner, **RATES), [labelled(device=device)])
    assert torch.equal(tuner.compact[name].detach(), model.hidden.weight.detach()[mask])


def test_a_compiled_model(device):
    """Compiled by what the device has: a CPU's compiler takes long, and is tested elsewhere."""
    model, batch = Classifier().to(device), labelled(device=device)
    twin, selection = copy.deepcopy(model), selected(model)
    for one in (model, twin):
        tuner = fps.attach(one, selection)
        called = torch.compile(one, backend="aot_eager" if device.type == "cpu" else "inductor") if one is twin else one
        optimizer = fps.MaskedAdamW(tuner, **RATES)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(called(batch[0]), batch[1]).backward()
            optimizer.step()
    assert_same(model.cpu(), twin.cpu())


@pytest.mark.parametrize("captured", [False, True])
def test_whole_steps_in_a_graph(device, captured):
    """Replayed steps end with the bits of launched ones, and follow a learning rate on the device."""
    if captured and device.type != "cuda":
        return  # nothing to capture in: the same steps, launched, are the other case
    model, batch = Classifier().to(device), labelled(device=device)
    twin, selection = copy.deepcopy(model), selected(model)
    ends = []
    for one, graphed in ((model, False), (twin, captured)):
        lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
        optimizer = fps.MaskedAdamW(fps.attach(one, selection), lr=lr, capturable=True)

        def step(one=one, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(one(batch[0]), batch[1]).backward()
            optimizer.step()

        run = _captured(step) if graphed else step
        for _ in range(0 if graphed else 3):
            run()
        lr.fill_(1e-2)
        for _ in range(2):
            run()
        ends.append([p.detach().clone() for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _captured(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
