"""The parts of a training run by themselves: averages, losses, rates, views."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fps_kernels as fps
from fps_kernels.runs.averaging import Average, show, values_of
from fps_kernels.runs.loop import Progress
from fps_kernels.runs.loss import Loss, balanced
from fps_kernels.runs.views import Augmentation, as_seen_by

CONFIG = {"input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG |= {"crop_pct": 1.0, "crop_mode": "center"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_is_shown_and_taken_back_bit_by_bit(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(4, 6, dtype=dtype)
    with fps.attach(model, fps.select(model, [x], budget=fps.PerNeuron(2), progress=False)) as tuner:
        optimizer = fps.MaskedAdamW(tuner, lr=0.1)
        average = Average(tuner, 0.5)
        expected = {name: p.detach().float().clone() for name, p in tuner.named_parameters()}
        for step in range(5):
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
            decay = min(0.5, (1 + step) / (10 + step))
            for name, p in tuner.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().float()
        for name, t in average.held.items():
            torch.testing.assert_close(t, expected[name], rtol=1e-6, atol=1e-7)
        before, weights = values_of(tuner), [p.detach().clone() for p in model.parameters()]
        with average.shown():
            for name, p in tuner.named_parameters():
                assert torch.equal(p.detach(), average.held[name].to(p.dtype))
            inside = model(x)
        assert not torch.equal(inside, model(x))
        assert all(torch.equal(t, values_of(tuner)[name]) for name, t in before.items())
        assert all(torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True))
        show(tuner, average.held)
        assert torch.equal(model(x), inside)


def test_of_equal_accuracies_the_lower_loss_is_better():
    at = Progress()
    assert at.is_improved_by(0.0, 5.0)
    at.best, at.best_loss = 0.5, 1.0
    assert [at.is_improved_by(a, b) for a, b in ((0.5, 0.9), (0.6, 2.0), (0.5, 1.0), (0.4, 0.1), (0.5, math.nan))] == [
        *(True, True),
        *(False, False, False),
    ]


def loss(**given):
    return Loss(
        **{"classes": 4, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None, "seed": 0} | given
    )


def test_classes_count_as_they_are_told():
    logits, target = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 2, 3])
    weights = balanced(target.tolist(), tuple("abcd"))
    assert weights == pytest.approx((0.5, 1.5, 1.5, 1.5))
    assert sum(weights[i] for i in target) == pytest.approx(len(target))
    single = F.cross_entropy(logits, target, reduction="none")
    expected = sum(weights[t] * float(v) for t, v in zip(target.tolist(), single, strict=True))
    assert float(loss(class_weights=torch.tensor(weights))(logits, target)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="the class c has no training image"):
        balanced([0, 1], tuple("abc"))


@pytest.mark.parametrize("way", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_depends_on_the_place_alone(way):
    x, y = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    mix = loss(**way)
    images, shares = mix.mix(x, y, 3, 0)
    assert images.shape == x.shape
    assert not torch.equal(images, x)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    torch.rand(3)
    state = torch.get_rng_state()
    again = mix.mix(x, y, 3, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], shares)
    assert not torch.equal(mix.mix(x, y, 4, 0)[0], images)
    assert math.isfinite(float(mix(torch.randn(5, 4), shares)))
    assert loss().mix(x, y, 3, 0) == (x, y)


def test_views():
    image = Image.new("RGB", (20, 12), (255, 0, 0))
    for augmentation in (
        None,
        Augmentation("flip"),
        Augmentation("crop"),
        Augmentation("none", color_jitter=0.5),
        Augmentation("crop", policy="rand-m9-mstd0.5", erase=1.0),
        Augmentation("flip", policy="augmix-m3-w3"),
    ):
        assert as_seen_by(CONFIG, augmentation)(image).shape == (3, 8, 8)
    assert not torch.equal(as_seen_by(CONFIG, Augmentation(erase=1.0))(image), as_seen_by(CONFIG)(image))
