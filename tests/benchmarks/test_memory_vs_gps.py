"""``benchmarks.memory_vs_gps --model``: anyone's model, simulated."""

import pytest
import torch
from torch import nn

from benchmarks import memory_vs_gps
from fps_kernels.memory import measure


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 5))


def test_a_function_of_ones_own(capsys):
    memory_vs_gps.main(["--model", "tests.benchmarks.test_memory_vs_gps:small", "--input", "12", "--batch", "16"])
    text = capsys.readouterr().out
    assert "tests.benchmarks.test_memory_vs_gps:small, batch 16, float32, simulated" in text
    assert "GPS, two views" not in text  # which needs images
    found = memory_vs_gps.of_model("tests.benchmarks.test_memory_vs_gps:small", (12,), 16)
    model, x, y = small(), torch.randn(16, 12), torch.zeros(16, dtype=torch.long)
    for method in ("forward", "GPS, cross-entropy"):
        real = measure(lambda method=method: memory_vs_gps.METHODS[method](model, x, y), existing=[model, x, y]).peak
        assert found[method] == pytest.approx(real, rel=0.02), method


def test_a_model_of_timm(capsys):
    memory_vs_gps.main(["--model", "test_vit", "--batch", "2"])
    assert "FPS, micro-batches of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_nothing"], "timm has no model 'vit_nothing'; a function of your own is given as module:function"),
        (["--model", "tests.benchmarks.test_memory_vs_gps:small"], "--input is needed with"),
        (["--model", "nowhere:model"], "No module named 'nowhere'"),
        (["--model", "tests.benchmarks.test_memory_vs_gps:large", "--input", "3"], "has no attribute 'large'"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        memory_vs_gps.main(arguments)
    assert message in capsys.readouterr().err
