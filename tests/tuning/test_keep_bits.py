"""``attach(model, selection, keep_bits=8)``: the switch in all that an attached model is used for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps
from fps_kernels.keeping.packed import Groups, Packed
from tests.keeping.test_kept import Block, batch, distance, network
from tests.support.gradients import random_selection

hooks = torch._C._autograd._top_saved_tensors_default_hooks


def chosen(model: nn.Module) -> fps.Selection:
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    return random_selection(model, names, 0.02, tuple(name for name, p in model.named_parameters() if p.dim() == 1))


def gradients(model: nn.Module, tuner: fps.Tuner, x: torch.Tensor) -> dict[str, torch.Tensor]:
    for p in tuner.parameters():
        p.grad = None
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in tuner.named_parameters()}


def both(model: nn.Module) -> tuple[tuple[nn.Module, fps.Tuner], tuple[nn.Module, fps.Tuner]]:
    """The model attached without the switch, and a copy of it with."""
    selection, other = chosen(model), copy.deepcopy(model)
    return (model, fps.attach(model, selection)), (other, fps.attach(other, selection, keep_bits=8))


def test_gradients_are_nearly_those_without_and_memory_is_less_than_half():
    (plain, tuner), (packed, other) = both(network(depth=8))
    x = batch()
    assert 0 < distance(gradients(packed, other, x), gradients(plain, tuner, x)) < 0.01
    added = [fps.memory.measure(lambda m=m: m(x), existing=[m, x]).added for m in (plain, packed)]
    assert added[1] < 0.5 * added[0]
    assert torch.equal(plain(x), packed(x))
    assert hooks(False) is None


def test_columns_are_computed_again_from_what_is_packed():
    """Behind a GELU and a LayerNorm an attached layer keeps nothing; what their nodes keep is unpacked once for both."""
    model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 8))
    tuner = fps.attach(model, random_selection(model, ["2.weight", "4.weight"], 0.02, ("0.bias",)), keep_bits=8)
    unpacked, original = [], Packed.tensor

    def note(self):
        unpacked.append((id(self), self._held is None and (self._memory is None or self._memory() is None)))
        return original(self)

    y = model(torch.randn(500, 16))
    assert y.grad_fn.saved_tensors == ()
    Packed.tensor = note
    try:
        y.square().sum().backward()
    finally:
        Packed.tensor = original
    assert len({packed for packed, _ in unpacked}) == 2  # GELU's input and LayerNorm's
    assert sum(made for _, made in unpacked) == 2
    assert all(p.grad is not None for p in tuner.parameters())


def test_an_input_that_is_kept_anyway_is_packed_once():
    model = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 8))
    fps.attach(model, random_selection(model, ["2.weight"], 0.02, ("0.bias",)), keep_bits=8)
    made, original = [], Groups._pack
    Groups._pack = lambda self, t: (made.append(tuple(t.shape)), original(self, t))[1]
    try:
        y = model(torch.randn(500, 16))
    finally:
        Groups._pack = original
    assert made == [(500, 128)]
    y.sum().backward()


def test_training_goes_the_same_way():
    (plain, tuner), (packed, other) = both(network())
    losses = []
    for model, t in ((plain, tuner), (packed, other)):
        optimizer = fps.MaskedAdamW(t, lr=1e-3)
        for step in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(model(batch(step % 3)), batch(step % 3)[..., :10])
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_unselected_entries_stay_as_they_are():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    selection = chosen(model)
    with fps.attach(model, selection, keep_bits=8) as tuner:
        optimizer = fps.MaskedAdamW(tuner, lr=1e-2)
        model(batch()).square().mean().backward()
        optimizer.step()
    for name, mask in selection.masks().items():
        p = model.get_parameter(name).detach()
        assert torch.equal(p[~mask], before[name][~mask]), name
        assert bool((p[mask] != before[name][mask]).any()), name


def test_a_copy_has_the_switch_and_detach_takes_it_away():
    model = network()
    tuner = fps.attach(model, chosen(model), keep_bits=8)
    copied = copy.deepcopy(model)
    found = gradients(copied, fps.tuner_of(copied), batch())
    expected = gradients(model, tuner, batch())
    for name, g in expected.items():
        assert torch.equal(found[name], g), name
    tuner.detach()
    model(batch())
    added = [fps.memory.measure(lambda m=m: m(batch()), existing=[m]).added for m in (model, copied)]
    assert added[0] > added[1]


def test_a_model_whose_parts_are_called():
    """Who calls the parts and not the model has the switch too, once that is seen."""
    model = network()
    tuner = fps.attach(model, chosen(model), keep_bits=8)

    def by_parts(x):
        for part in model:
            x = part(x)
        return x.square().mean()

    by_parts(batch()).backward()
    made, original = [], Groups._pack
    Groups._pack = lambda self, t: (made.append(tuple(t.shape)), original(self, t))[1]
    try:
        by_parts(batch()).backward()
    finally:
        Groups._pack = original
    assert made
    assert hooks(False) is None
    assert tuner.attached


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(16, 128), Block(), nn.Linear(128, 10)

        def forward(self, x):
            return self.last(checkpoint(self.block, self.first(x), use_reentrant=reentrant))

    (plain, tuner), (packed, other) = both(Checkpointed())
    assert distance(gradients(packed, other, batch()), gradients(plain, tuner, batch())) < 0.02


def test_a_checkpoint_around_the_model_keeps_nothing_to_pack():
    (plain, tuner), (packed, other) = both(network())
    for p in (*tuner.parameters(), *other.parameters()):
        p.grad = None
    for model in (plain, packed):
        checkpoint(model, batch().requires_grad_(), use_reentrant=False).square().mean().backward()
    for (name, p), (_, q) in zip(tuner.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scaler_and_accumulation(dtype):
    (plain, tuner), (packed, other) = both(network())
    found = []
    for model, t in ((plain, tuner), (packed, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for seed in (1, 2):
            with torch.autocast("cpu", dtype):
                loss = model(batch(seed)).float().square().mean() / 2
            scaler.scale(loss).backward()
        found.append({name: p.grad / 2**4 for name, p in t.named_parameters()})
    assert distance(found[1], found[0]) < 0.03


def test_an_error_in_the_forward_pass_leaves_no_hooks():
    model = network()
    fps.attach(model, chosen(model), keep_bits=8)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 50, 15))
    assert hooks(False) is None


def test_a_compiled_model_keeps_what_its_partitioner_decides():
    (plain, tuner), (packed, other) = both(network())
    compiled = torch.compile(packed, backend="aot_eager")
    found, expected = gradients(compiled, other, batch()), gradients(plain, tuner, batch())
    assert distance(found, expected) < 1e-4
    assert hooks(False) is None


@pytest.mark.parametrize("keep_bits", [4, 16, 0, True])
def test_other_numbers_of_bits_are_refused_and_nothing_is_attached(keep_bits):
    model = network()
    with pytest.raises(ValueError, match="keep_bits must be 8 or None"):
        fps.attach(model, chosen(model), keep_bits=keep_bits)
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight.requires_grad
