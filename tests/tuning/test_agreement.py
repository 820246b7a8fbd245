"""Values and weights agree by what they hold, whoever changed one of them and however."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from tests.support.gradients import random_selection

NAMES = ("0.weight", "2.weight")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def everything() -> dict[str, torch.Tensor]:
    """All entries: what a plain model does can be compared."""
    return {"0.weight": torch.ones(16, 8, dtype=torch.bool), "2.weight": torch.ones(4, 16, dtype=torch.bool)}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 8), torch.randint(4, (64,))


def plain_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of the weights as they are in memory."""
    first, second = (model[i].weight.detach() for i in (0, 2))
    return F.linear(F.gelu(F.linear(x, first, model[0].bias)), second, model[2].bias)


def twins(network: nn.Module) -> dict[str, tuple[nn.Module, list[nn.Parameter]]]:
    """A plain model and an attached one, with the parameters that an optimizer is given."""
    plain, attached = copy.deepcopy(network), copy.deepcopy(network)
    for bias in (plain[0].bias, plain[2].bias):
        bias.requires_grad_(False)
    tuner = fps.attach(attached, everything())
    return {
        "plain": (plain, [plain[0].weight, plain[2].weight]),
        "attached": (attached, list(tuner.parameters())),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_through_data_on_either_side(dtype):
    model = network().to(dtype)
    masks = random_selection(model, NAMES, density=0.4).masks()
    tuner = fps.attach(model, masks)
    x, values = torch.randn(3, 8, dtype=dtype), tuner.compact["2.weight"]
    before = model(x)
    values.data.add_(1.0)
    assert not torch.equal(model(x), before)
    held = model[2].weight.detach()[masks["2.weight"]]
    assert torch.equal(held, values.detach().to(dtype))
    model[2].weight.data.mul_(0.5)  # an adapter is merged, weights are pruned
    assert torch.equal(model(x), plain_output(model, x))
    assert torch.equal(values.detach().to(dtype), model[2].weight.detach()[masks["2.weight"]])


def test_a_module_that_is_called_by_itself_checks_its_own_weight():
    model = network()
    tuner = fps.attach(model, everything())
    values, h = tuner.compact["2.weight"], torch.randn(3, 16)
    for _ in range(3):
        values.data.sub_(3.0)
        y = model[2](h)
        assert torch.equal(y, F.linear(h, values.detach().view(4, 16), model[2].bias))


def test_where_both_were_written_the_values_count():
    model = network()
    tuner = fps.attach(model, everything())
    model[2].weight.data.fill_(5.0)
    tuner.compact["2.weight"].data.fill_(7.0)
    model(torch.randn(3, 8))
    assert torch.all(model[2].weight.detach() == 7)


@pytest.mark.parametrize("make", [torch.optim.SGD, fps.MaskedAdamW])
def test_a_weight_that_is_written_between_backward_and_step(make):
    """The step starts from there; the third one is taken by MaskedAdamW's plan."""
    model = network()
    tuner = fps.attach(model, everything())
    optimizer = make(tuner.parameters(), lr=0.001)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        if step == 2:
            model[0].weight.data.mul_(2.0)
            wanted = model[0].weight.detach().clone()
        optimizer.step()
    assert (tuner.compact["0.weight"].detach().view(16, 8) - wanted).abs().max() < 0.1
    assert torch.equal(tuner.compact["0.weight"].detach().view(16, 8), model[0].weight.detach())


def test_an_average_of_the_values_is_swapped_in_through_data():
    """As torch_ema and the average of diffusers do for an evaluation."""
    found = {}
    x, t = data()
    for name, (model, parameters) in twins(network()).items():
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        shadow = [p.detach().clone() for p in parameters]
        for _ in range(5):
            F.cross_entropy(model(x), t).backward()
            optimizer.step()
            optimizer.zero_grad()
            for s, p in zip(shadow, parameters, strict=True):
                s.lerp_(p.detach(), 0.1)
        saved = [p.detach().clone() for p in parameters]
        losses = [F.cross_entropy(model(x), t).item()]
        for p, s in zip(parameters, shadow, strict=True):
            p.data.copy_(s.data)
        losses.append(F.cross_entropy(model(x), t).item())
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for p, s in zip(parameters, saved, strict=True):
            p.data.copy_(s.data)
        losses.append(F.cross_entropy(model(x), t).item())
        found[name] = losses, state
    assert found["attached"][0] == pytest.approx(found["plain"][0], rel=1e-5)
    for name in NAMES:
        torch.testing.assert_close(found["attached"][1][name], found["plain"][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through_data", [True, False])
def test_a_sharpness_aware_step_perturbs_and_restores(through_data):
    found = {}
    x, t = data()
    for name, (model, parameters) in twins(network()).items():
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        found[name] = []
        for _ in range(3):
            F.cross_entropy(model(x), t).backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in parameters]).norm()
                old = [p.clone() for p in parameters]
                for p in parameters:
                    (p.data if through_data else p).add_(p.grad * (2.0 / norm))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            found[name].append(loss.item())
            for p, o in zip(parameters, old, strict=True):
                if through_data:
                    p.data = o
                else:
                    with torch.no_grad():
                        p.copy_(o)
            optimizer.step()
            optimizer.zero_grad()
    assert found["attached"] == pytest.approx(found["plain"], rel=1e-5)


def test_a_flat_buffer_that_parameters_are_views_of():
    """Sharded optimizers give parameters memory of theirs, and step that."""
    model, (x, _) = network(), data()
    tuner = fps.attach(model, everything())
    parameters = list(tuner.parameters())
    flat = torch.cat([p.detach() for p in parameters])
    begin = 0
    for p in parameters:
        p.data = flat[begin : begin + p.numel()]
        begin += p.numel()
    model(x)
    flat.mul_(0.5)
    assert torch.equal(model(x), plain_output(model, x))
    assert torch.equal(model[2].weight.detach().flatten(), flat[-64:])


def changed_as(model: nn.Module, side: str, through_data: bool) -> nn.Module:
    """With 0.5 in every entry of the last weight, on one side only."""
    written = fps.tuner_of(model).compact["2.weight"] if side == "values" else model[2].weight
    with torch.no_grad():
        (written.data if through_data else written).fill_(0.5)
    return model


@pytest.mark.parametrize("side", ["values", "weight"])
@pytest.mark.parametrize("through_data", [True, False])
def test_every_way_out_settles_first(side, through_data, tmp_path):
    def changed() -> tuple[nn.Module, fps.Tuner]:
        model = network()
        tuner = fps.attach(model, everything())
        written = tuner.compact["2.weight"] if side == "values" else model[2].weight
        with torch.no_grad():
            (written.data if through_data else written).fill_(0.25)
        return model, tuner

    model, tuner = changed()
    fps.save_delta(tuner, tmp_path / "delta.safetensors")
    assert torch.all(fps.load_delta(tmp_path / "delta.safetensors").values["2.weight"] == 0.25)
    model, tuner = changed()
    assert torch.all(model.state_dict()["2.weight"] == 0.25)
    model, tuner = changed()
    assert torch.all(tuner.state_dict()["2.weight"] == 0.25)
    model, tuner = changed()
    assert torch.all(tuner.compact["2.weight"] == 0.25)
    assert torch.all(model[2].weight.detach() == 0.25)
    model, tuner = changed()
    tuner.settle()
    assert torch.all(model[2].weight.detach() == 0.25)
    model, tuner = changed()
    tuner.detach()
    assert torch.all(model[2].weight == 0.25)
    model, tuner = changed()
    assert torch.all(copy.deepcopy(model)[2].weight.detach() == 0.25)
    model, tuner = changed()
    assert torch.all(model.to(torch.bfloat16)[2].weight.detach() == 0.25)
    model, tuner = changed()
    base = network()
    base.load_state_dict({**model.state_dict(), "2.weight": torch.zeros(4, 16)})
    assert torch.all(fps.diff(base, changed_as(model, side, through_data)).dense["2.weight"] == 0.5)


def test_loading_counts_whatever_the_values_were():
    model = network()
    tuner = fps.attach(model, everything())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuner.compact["2.weight"].data.fill_(3.0)
    model.load_state_dict(state)
    assert torch.equal(tuner.compact["2.weight"].detach().view(4, 16), state["2.weight"])
    compact = {name: value.clone() for name, value in tuner.state_dict().items()}
    model[2].weight.data.fill_(1.0)
    tuner.load_state_dict(compact)
    assert torch.equal(model[2].weight.detach(), state["2.weight"])


def test_a_merged_adapter_of_peft_is_seen():
    """PEFT adds to the weight itself, through ``.data``; what it takes away again leaves the rounding of both sums."""
    peft = pytest.importorskip("peft")
    model, (x, t) = network(), data()
    tuner = fps.attach(model, everything())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
    wrapped.eval()
    for p in tuner.parameters():
        p.requires_grad_()  # PEFT freezes all that is not its own
    with torch.no_grad():
        before = wrapped(x)
        wrapped.merge_adapter()
        torch.testing.assert_close(wrapped(x), before, rtol=1e-4, atol=1e-5)
        optimizer = fps.MaskedAdamW(tuner, lr=0.0, weight_decay=0.0)
        merged = wrapped(x)
    F.cross_entropy(wrapped(x), t).backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(wrapped(x), merged)
        wrapped.unmerge_adapter()
        torch.testing.assert_close(wrapped(x), before, rtol=1e-4, atol=1e-5)


def test_a_pass_that_is_computed_again_sees_what_the_first_one_saw():
    """Gradient checkpointing runs layers again in the backward pass, outside of the model's own forward pass."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model, (x, t) = Checkpointed(), data()
    plain = copy.deepcopy(model.body)
    F.cross_entropy(plain(x), t).backward()
    tuner = fps.attach(model, {f"body.{name}": mask for name, mask in everything().items()})
    F.cross_entropy(model(x), t).backward()
    for name in NAMES:
        wanted = plain.get_parameter(name).grad.flatten()
        torch.testing.assert_close(tuner.compact[f"body.{name}"].grad, wanted, rtol=1e-4, atol=1e-6)
