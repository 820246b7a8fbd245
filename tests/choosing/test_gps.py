"""The gradient-based baseline: its loss, its gradients, what it leaves behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels import gps
from tests.support.models import Classifier, images, labelled


def contrastive_by_hand(features: torch.Tensor, target: torch.Tensor, temperature: float) -> float:
    z = F.normalize(features.double(), dim=1)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        denominator = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
        positives = [p for p in others if target[p] == target[i]]
        if positives:
            terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
            losses.append(-sum(terms) / len(positives))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("target", [[0, 1, 0, 2, 1], [0, 0, 0, 0, 0], [0, 1, 2, 3, 3]])
def test_contrastive_loss_is_the_papers_formula(target):
    features, target = torch.randn(5, 4), torch.tensor(target)
    got = gps.supervised_contrastive_loss(features, target, 0.5)
    assert float(got) == pytest.approx(contrastive_by_hand(features, target, 0.5), rel=1e-5)


def test_contrastive_loss_without_positives_is_zero():
    features = torch.randn(3, 4, requires_grad=True)
    loss = gps.supervised_contrastive_loss(features, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert features.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"features must be \[N, D\] and target \[N\]"):
        gps.supervised_contrastive_loss(features, torch.arange(4))


def test_views_are_random_crops():
    x = torch.rand(5, 3, 16, 16)
    first, second = gps.random_views(x)
    assert first.shape == second.shape == x.shape
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    flat = torch.full((2, 3, 8, 8), 0.25)
    torch.testing.assert_close(gps.random_views(flat)[0], flat)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ["embed.weight", "hidden.weight", "out.weight"]
    grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("micro_batch", [None, 4, 5])
def test_cross_entropy_takes_the_largest_gradients_of_a_full_pass(micro_batch):
    model = Classifier().eval()
    batches = [labelled(9), labelled(9)]
    selection = fps.gps_select(model, batches, loss="cross_entropy", budget=fps.PerNeuron(2), micro_batch=micro_batch)
    expected = gradients(model, sum(F.cross_entropy(model(x), y) for x, y in batches))
    for name, gradient in expected.items():
        best = gradient.flatten(1).abs().topk(2).indices.sort(1).values
        assert torch.equal(selection[name].columns.view(-1, 2).long(), best)


@pytest.mark.parametrize("micro_batch", [None, 2, 5])
def test_contrastive_loss_of_micro_batches_is_that_of_the_batch(micro_batch):
    model = Classifier().eval()
    first, second, y = images(7), images(7), torch.randint(2, (7,))
    selection = fps.gps_select(model, [((first, second), y)], micro_batch=micro_batch, budget=fps.PerNeuron(3))
    features = []
    handle = model.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    model(first), model(second)
    handle.remove()
    expected = gradients(model, gps.supervised_contrastive_loss(torch.cat(features), y.repeat(2)))
    for name, gradient in expected.items():
        best = gradient.flatten(1).abs().topk(3).indices.sort(1).values
        assert torch.equal(selection[name].columns.view(-1, 3).long(), best)


def test_roles_are_those_of_select():
    model, data = Classifier(), [labelled()]
    a = fps.gps_select(model, data, loss="cross_entropy")
    b = fps.select(model, data)
    assert (list(a), a.dense, a.skipped) == (list(b), b.dense, b.skipped)
    assert a.nnz == b.nnz
    custom = fps.gps_select(model, data, loss=lambda output, target: F.cross_entropy(output, target), include="out*")
    assert list(custom) == ["out.weight"]
    assert torch.equal(custom["out.weight"].columns, a["out.weight"].columns)


def test_the_model_is_left_as_found():
    model = Classifier().train()
    model.embed.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = [p.requires_grad for p in model.parameters()]
    fps.gps_select(model, [labelled()], views=gps.random_views)
    with pytest.raises(ValueError, match="failed on batch 1"):
        fps.gps_select(model, [labelled(), (torch.ones(2, 9), torch.zeros(2).long())], loss="cross_entropy")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.hidden.weight.grad is None
    assert model.training


def test_weights_that_only_a_later_batch_uses():
    class Router(Classifier):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else self.head(self.embed(x).mean((2, 3)))

    x, y = labelled()
    selection = fps.gps_select(Router(), [(x.abs().neg(), y), (x.abs(), y)], loss="cross_entropy")
    assert list(selection) == ["embed.weight", "hidden.weight", "out.weight"]


def test_compiled_models_are_seen():
    model, batch = Classifier(), labelled()
    selection = fps.gps_select(torch.compile(model, fullgraph=True), [batch], loss="cross_entropy")
    expected = fps.gps_select(model, [batch], loss="cross_entropy")
    assert [n.removeprefix("_orig_mod.") for n in selection] == list(expected)
    assert all(torch.equal(a.columns, b.columns) for a, b in zip(selection.values(), expected.values(), strict=True))


def test_heads_that_are_called_by_keyword():
    class ByKeyword(Classifier):
        def forward(self, x):
            x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
            return self.head(input=x.mean(1))

    assert "embed.weight" in fps.gps_select(ByKeyword(), [labelled()], views=gps.random_views)


def test_an_interruption_leaves_nothing_behind():
    model = Classifier().train()
    model.embed.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]

    def interrupted(m, inputs):
        output = m(inputs)
        if output.requires_grad:
            output.sum().backward()
        raise KeyboardInterrupt

    for run in (
        lambda: fps.gps_select(model, [labelled()], loss="cross_entropy", forward=interrupted),
        lambda: fps.select(model, [images()], forward=interrupted),
    ):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        assert torch._C._len_torch_function_stack() == 0


def test_models_without_a_head():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4))
    assert fps.gps_select(model, [labelled()], views=gps.random_views).nnz == 10


def test_bad_input():
    model = Classifier()
    for arguments, match in (
        ({"data": [labelled()], "loss": "hinge"}, "loss must be 'contrastive', 'cross_entropy' or a function"),
        ({"data": [labelled()]}, "compares two views of every image"),
        ({"data": [images()]}, r"must give \(inputs, target\) batches"),
        ({"data": []}, "data gave no batch"),
        ({"data": [labelled()], "loss": "cross_entropy", "micro_batch": 0}, "micro_batch must be at least 1"),
        (
            {"data": [labelled()], "loss": lambda o, t: o.sum() * float("nan")},
            "scores of embed.weight contain NaN or Inf: check the gradient",
        ),
        ({"data": [labelled()], "temperature": 0.0}, "temperature must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            fps.gps_select(model, **arguments)
    for arguments, match in (
        ({"loss": 3}, "loss must be 'contrastive', 'cross_entropy' or a function, got 3"),
        ({"budget": 0.1}, "budget must be PerNeuron, PerTensor, LikeLoRA or Global, got 0.1"),
    ):
        with pytest.raises(TypeError, match=match):
            fps.gps_select(model, [labelled()], **arguments)
    with pytest.raises(ValueError, match="outside torch.inference_mode"), torch.inference_mode():
        fps.gps_select(model, [labelled()])
