"""``kept``: what autograd keeps takes fewer bytes, the forward pass is as it was, and gradients are nearly so."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fps_kernels as fps
from fps_kernels.keeping.kept import Keeping
from fps_kernels.keeping.packed import Groups, Packed
from fps_kernels.keeping.policy import SMALL, Way, way_of

WIDTH = 128


class Block(nn.Module):
    """Attention and an MLP, as in any transformer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + F.dropout(self.proj(attended), self.dropout, self.training)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def network(dropout: float = 0.0, depth: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, WIDTH), *(Block(dropout) for _ in range(depth)), nn.Linear(WIDTH, 10))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, x: torch.Tensor, keeping=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with keeping if keeping is not None else torch.enable_grad():
        loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    assert found.keys() == expected.keys()
    squares = [((found[name] - g).double().square().sum(), g.double().square().sum()) for name, g in expected.items()]
    return float((sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5)


def test_less_than_half_of_the_memory_and_nearly_the_same_gradients():
    model, x = network(depth=8), batch()
    loss, exact = gradients(model, x)
    same, found = gradients(model, x, fps.kept())
    assert torch.equal(loss, same)
    assert 0 < distance(found, exact) < 0.01

    def forward(keeping):
        with keeping:
            return model(x)

    plain, packed = (
        fps.memory.measure(lambda k=k: forward(k), existing=[model, x]) for k in (torch.enable_grad(), fps.kept())
    )
    assert packed.added < 0.45 * plain.added


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype):
    model, x = network().to(dtype), batch().to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double())[1]
    plain, found = gradients(model, x)[1], gradients(model, x, fps.kept())[1]
    exact = {name: g.to(dtype) for name, g in exact.items()}
    assert distance(found, exact) < 2 * distance(plain, exact) + 0.01


def test_leaving_the_context_leaves_nothing_behind():
    hooks = torch._C._autograd._top_saved_tensors_default_hooks
    keeping = fps.kept()
    with keeping, keeping:
        assert hooks(False) is not None
    assert hooks(False) is None
    with pytest.raises(RuntimeError, match="inside"), keeping:
        raise RuntimeError("inside")
    assert hooks(False) is None


@pytest.mark.parametrize("bits", [4, 2, 16, None])
def test_only_8_bits_are_offered(bits):
    with pytest.raises(ValueError, match=r"bits must be 8"):
        fps.kept(bits)


def packed_by(run) -> list[tuple[str, tuple[int, ...]]]:
    """What was packed, and how."""
    found = []
    original = Packed.__init__

    def note(self, t, send, back):
        found.append((type(self).__name__, tuple(t.shape)))
        original(self, t, send, back)

    Packed.__init__ = note
    try:
        with fps.kept():
            run()
    finally:
        Packed.__init__ = original
    return found


def test_parameters_constants_integers_and_small_tensors_stay_as_they_are():
    weight, x = nn.Parameter(torch.randn(200, 200)), torch.randn(200, 200, requires_grad=True) * 1
    index = torch.randint(200, (20_000,))
    packed = packed_by(lambda: (x @ weight, F.embedding(index, weight), x.bfloat16() @ weight.bfloat16().t()))
    assert packed == [("Groups", (200, 200)), ("Groups", (200, 200))]  # x, and x in bfloat16
    assert not packed_by(lambda: torch.randn(200, 200) @ weight)
    small = torch.randn(SMALL - 1, requires_grad=True) * 1
    assert not packed_by(lambda: small.sigmoid() * small)
    assert not packed_by(lambda: (x.double() @ weight.double()).exp())


def test_what_is_divided_by_and_logarithms_stay_as_they_are():
    x = torch.rand(200, 200, requires_grad=True) * 1
    for function in (torch.sqrt, lambda x: x.log_softmax(1), torch.rsqrt):
        assert way_of(function(x)) is Way.WHOLE, function
    assert way_of(x.softmax(1)) is Way.GROUPS
    assert way_of(x[:1].expand(200, 200) * 1) is Way.GROUPS
    assert way_of((x[:1] * 1).expand(200, 200)) is Way.WHOLE


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keeping) -> list[torch.Tensor]:
    """Gradients of attention over activations, of which a few channels are much larger than others."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with keeping:
        y = F.scaled_dot_product_attention(*(x * 1 for x in leaves))
    return list(torch.autograd.grad(y, leaves, torch.ones_like(y) * torch.linspace(-1, 1, y.shape[-1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_of_a_fused_attention_keep_more_bits(dtype):
    """In 8 bits scores would be off by more than probabilities bear: they are computed again, their sums are not."""
    scales = torch.ones(64)
    scales[3] = 6
    q, k, v = ((torch.randn(2, 4, 50, 64) * s).to(dtype) for s in (scales, scales, torch.ones(64)))
    exact = attention(*(x.double() for x in (q, k, v)), torch.enable_grad())
    plain, found = attention(q, k, v, torch.enable_grad()), attention(q, k, v, fps.kept())
    for a, b, c in zip(found, plain, exact, strict=True):
        allowed = 2 * float((b.double() - c).norm()) + 0.04 * float(c.norm())
        assert float((a.double() - c).norm()) < allowed
    with fps.kept():
        y = F.scaled_dot_product_attention(*(x.requires_grad_() * 1 for x in (q, k, v)))
    ways = [getattr(y.grad_fn, f"_raw_saved_{name}").data.packed for name in ("query", "key", "value")]
    assert [heads._attended for heads in ways] == [True, True, False]
    assert all(heads._waiting is None for heads in ways)


def test_nothing_is_packed_twice():
    """A tensor that several operations keep, also as a view with other dimensions, is packed once."""
    x = torch.randn(100, 128, requires_grad=True) * 1
    packed = packed_by(lambda: (x.sigmoid().view(50, 256).sin(), x.sin(), x.cos(), x.t().exp().tanh()))
    assert packed.count(("Groups", (100, 128))) == 2  # x, and its sigmoid
    assert len(packed) == 4  # ... and exp of its transpose, and tanh of that


def test_memory_that_is_used_again_is_not_taken_for_what_was_there():
    weight = nn.Parameter(torch.randn(128, 128))
    with fps.kept():
        outputs = []
        for seed in range(20):  # each x is freed before the next is made, probably in its place
            x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)).requires_grad_() * 1
            outputs.append((x.exp() * weight).sum())
            del x
    for seed, output in enumerate(outputs):
        (found,) = torch.autograd.grad(output, weight)
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed))
        assert float((found - x.exp()).abs().max()) < 0.02 * float(x.exp().max()), seed


def test_masks_of_dropout_take_a_bit():
    x = torch.randn(300, 301, requires_grad=True) * 1
    assert ("Mask", (300, 301)) in packed_by(lambda: F.dropout(x, 0.3))
    assert ("Mask", (300, 301)) in packed_by(lambda: torch.native_dropout(x, 0.3, True)[0])
    for function in (lambda x: F.dropout(x, 0.3), lambda x: torch.native_dropout(x, 0.3, True)[0]):
        grads = []
        for keeping in (torch.enable_grad(), fps.kept()):
            torch.manual_seed(3)
            leaf = torch.ones(300, 301, requires_grad=True)
            with keeping:
                y = function(leaf * 1)
            y.sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
    ones = torch.ones(100, 100)
    ones[-1, -1] = 2
    assert way_of(ones) is Way.WHOLE
    assert way_of(torch.full((100, 100), -torch.inf)) is Way.WHOLE


def test_changes_in_place_are_caught_where_the_tensor_itself_is_kept():
    weight = nn.Parameter(torch.randn(128, 128))
    small = torch.randn(4, 4, requires_grad=True) * 1
    for tensor, run in (
        (weight, lambda: torch.randn(128, 128, requires_grad=True) @ weight),
        (small, lambda: small.exp() * small),
    ):
        with fps.kept():
            y = run()
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_changes_in_place_are_caught_while_it_is_not_known_how_to_pack():
    """Images could be queries: they wait as they are, and nothing that is written to them meanwhile is packed."""
    for size in (3, 12):
        leaf = torch.randn(4, size, 32, 33, requires_grad=True)
        with fps.kept():
            x = leaf * 1
            y = x.sin()
            with torch.no_grad():
                x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_change_in_place_after_packing_does_not_reach_the_gradient():
    leaf = torch.randn(128, 128, requires_grad=True)
    grads = []
    for change in (False, True):
        leaf.grad = None
        with fps.kept():
            x = leaf * 1
            y = x.sigmoid() + x.sin()
        if change:
            x.detach().zero_()
        y.sum().backward()
        grads.append(leaf.grad.clone())
    assert torch.equal(*grads)


def test_a_change_between_two_uses_is_seen():
    leaf = torch.randn(128, 128, requires_grad=True)
    grads = []
    for keeping in (torch.enable_grad(), fps.kept()):
        leaf.grad = None
        with keeping:
            x = leaf * 1
            y = x.sin()
            x = x.mul_(3)  # sin keeps what was before
            z = x.sin()
        if keeping.__class__ is Keeping:
            (y.sum() + z.sum()).backward()
            grads.append(leaf.grad.clone())
    exact = leaf.detach().cos() + 3 * (3 * leaf.detach()).cos()
    assert float((grads[0] - exact).abs().max()) < 0.15


def test_an_output_that_keeps_itself_is_freed():
    """No cycle of references holds it until the garbage collector comes by."""
    gc.disable()
    try:
        for size in (200, 10):
            with fps.kept():
                y = (torch.randn(size, size, requires_grad=True) * 1).sigmoid()
            memory = StorageWeakRef(y.untyped_storage())
            del y
            assert memory.expired(), size
    finally:
        gc.enable()


def test_accumulation_and_a_graph_that_is_kept():
    model = network()
    single = [gradients(model, batch(seed), fps.kept())[1] for seed in (1, 2)]
    model.zero_grad()
    for seed in (1, 2):
        with fps.kept():
            loss = model(batch(seed)).square().mean()
        loss.backward(retain_graph=True)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, single[0][name] + single[1][name])
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(model[1].fc1.weight.grad, single[1]["1.fc1.weight"])


def test_second_derivatives():
    x = torch.randn(100, 100, requires_grad=True)
    with fps.kept():
        (first,) = torch.autograd.grad((x * 1).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert float((second + x.sin()).detach().abs().max()) < 0.05


def test_autocast_and_scaler():
    model, x = network(), batch()
    exact = gradients(model, x)[1]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    found = []
    for keeping in (torch.enable_grad(), fps.kept()):
        model.zero_grad()
        with keeping, torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        found.append({name: p.grad / 2**6 for name, p in model.named_parameters()})
    assert distance(found[1], exact) < 1.5 * distance(found[0], exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant):
    model, x = network(0.1), batch()

    def run(keeping):
        torch.manual_seed(5)
        model.zero_grad()
        with keeping:
            y = model[0](x)
            for block in model[1:3]:
                y = checkpoint(block, y, use_reentrant=reentrant)
            loss = model[3](y).square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    assert distance(run(fps.kept()), run(torch.enable_grad())) < 0.02


def test_inside_of_a_checkpoint_nothing_is_packed():
    model, x = network(), batch().requires_grad_()

    def forward(x):
        with fps.kept():
            return model(x)

    exact = gradients(model, x)[1]
    model.zero_grad()
    packed = Groups._pack
    Groups._pack = lambda *_: pytest.fail("packed")
    try:
        checkpoint(forward, x, use_reentrant=False).square().mean().backward()
    finally:
        Groups._pack = packed
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, exact[name]), name


def test_offloading_gets_what_is_packed():
    """A hook around is given codes and scales, and what is left as it is."""
    model, x = network(), batch()
    expected = gradients(model, x, fps.kept())[1]
    sent = []

    def run(hooks):
        model.zero_grad()
        with hooks, fps.kept():
            loss = model(x).square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def send(t):
        sent.append(t.dtype)
        return t.clone()

    for hooks in (saved_tensors_hooks(send, lambda t: t), save_on_cpu()):
        found = run(hooks)
        for name, g in expected.items():
            assert torch.equal(found[name], g), name
    assert torch.uint8 in sent
    assert torch.bfloat16 in sent


def test_transforms_of_functions():
    model, x = network(), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        with fps.kept():
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)(parameters)
    exact = gradients(model, x)[1]
    for name, g in exact.items():
        torch.testing.assert_close(found[name], g)
