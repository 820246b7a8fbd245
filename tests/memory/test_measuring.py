"""Peak bytes of live tensors: exact figures for programs whose memory is known, and simulation against reality."""

import pytest
import timm
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.memory import format_bytes, measure, simulated
from tests.support.models import Classifier

KB = 1024


def kilobytes(count: int) -> torch.Tensor:
    return torch.empty(count * 256)


def test_peak_is_exact():
    def program():
        a = kilobytes(4)
        b = a + 1  # 8 live
        del a  # 4
        c = torch.cat([b, b])  # 12
        del b, c
        return kilobytes(3)

    report = measure(program)
    assert (report.peak, report.before, report.added) == (12 * KB, 0, 12 * KB)
    assert report.result.numel() == 768


def test_views_and_in_place_operations_are_free():
    def program():
        a = kilobytes(4)
        a.view(2, -1).t().add_(1).mul_(2)

    assert measure(program).peak == 4 * KB


@pytest.mark.parametrize(
    ("convert", "bytes_of_indices"),
    [  # the compressed ones keep both rows of the coordinates they were made from, beside their offsets
        (torch.Tensor.to_sparse, 2 * 8 * 5),
        (torch.Tensor.to_sparse_csr, 2 * 8 * 5 + 8 * 6),
        (torch.Tensor.to_sparse_csc, 2 * 8 * 5 + 8 * 6),
    ],
)
def test_sparse_tensors_own_their_indices_and_values(convert, bytes_of_indices):
    sparse = convert(torch.eye(5))
    report = measure(lambda: None, existing=[sparse])
    assert report.before == bytes_of_indices + 4 * 5
    assert measure(lambda: convert(torch.eye(5)) * 2).peak >= bytes_of_indices + 4 * 5


def test_what_lived_before_counts_once():
    x, unused = kilobytes(4), kilobytes(8)
    assert measure(lambda: x + x).peak == 8 * KB
    assert measure(lambda: x + x).before == 4 * KB
    report = measure(lambda: x + x, existing=[x, unused])
    assert (report.peak, report.before) == (16 * KB, 12 * KB)


def test_autograd_keeps_activations():
    x = kilobytes(4)
    layers = nn.Sequential(*[nn.Sigmoid() for _ in range(5)])

    def train():
        layers(x.requires_grad_()).sum().backward()

    with torch.no_grad():
        assert measure(lambda: layers(x).sum()).added <= 8 * KB + 4
    assert measure(train).added >= 5 * 4 * KB


def test_repeats_exactly():
    model, x = Classifier(), torch.randn(4, 3, 8, 8)
    peaks = {measure(lambda: fps.select(model, [x]), existing=[model]).peak for _ in range(3)}
    assert len(peaks) == 1


@pytest.mark.parametrize("what", ["forward", "select", "micro-batched select", "gps", "backward"])
def test_simulation_equals_reality(what):
    def program(model, x, y):
        model.eval()
        if what == "forward":
            with torch.no_grad():
                model(x)
        elif what == "select":
            fps.select(model, [x])
        elif what == "micro-batched select":
            fps.select(model, [x], micro_batch=2)
        elif what == "gps":
            fps.gps_select(model, [(x, y)], loss="cross_entropy")
        else:
            model(x).sum().backward()

    def create():
        return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5)

    model, x, y = create(), torch.randn(6, 3, 64, 64), torch.zeros(6, dtype=torch.long)
    real = measure(lambda: program(model, x, y), existing=[model, x, y])
    with simulated() as build:
        model, x, y = build(create), torch.empty(6, 3, 64, 64), torch.zeros(6, dtype=torch.long)
        imagined = measure(lambda: program(model, x, y), existing=[model, x, y])
    assert imagined.before == pytest.approx(real.before, abs=256)  # the checks of values that a simulation leaves out
    assert imagined.peak == pytest.approx(real.peak, rel=0.01)


def test_simulated_models_need_no_memory():
    with simulated() as build:
        model = build(lambda: nn.Linear(2**20, 2**20))  # 4 TiB
        x = torch.empty(3, 2**20)
        report = measure(lambda: model(x), existing=[model, x])
    assert report.peak == 4 * (2**40 + 2**20 + 2 * 3 * 2**20)


def test_simulated_models_share_what_real_ones_share():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(1000, 8)
            self.head = nn.Linear(8, 1000, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.BatchNorm1d(8)
            self.again = self.norm
            self.head.weight.requires_grad_(False)

    with simulated() as build:
        model = build(Tied)
        assert model.head.weight is model.embedding.weight
        assert model.again is model.norm
        assert {name: p.requires_grad for name, p in model.named_parameters()} == {
            "embedding.weight": False,
            "norm.weight": True,
            "norm.bias": True,
        }
        report = measure(lambda: None, existing=[model])
    real = Tied()
    assert report.before == measure(lambda: None, existing=[real]).before == 4 * (8000 + 4 * 8) + 8


def test_printing():
    assert format_bytes(3 * 2**30) == "3.000 GiB"
    assert format_bytes(1.5 * 2**20) == "1.5 MiB"
    assert format_bytes(2048) == "2.0 KiB"
    assert format_bytes(7) == "7 B"
    assert str(measure(lambda: kilobytes(1))) == "peak 1.0 KiB (0 B before, 1.0 KiB added)"
