"""``fps.memory.plan``: what it foretells is what really running takes."""

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import fps_kernels as fps
from fps_kernels.memory import measure
from fps_kernels.memory.planning import METHODS
from fps_kernels.memory.rehearsal import lora_layers
from fps_kernels.weights.roles import default_dense
from fps_kernels.weights.survey import Survey
from tests.support.models import Classifier

NAME, BATCH = "vit_tiny_patch16_224", 4


def really(method: str, dtype: torch.dtype) -> int:
    """Peak bytes of running it."""
    model = timm.create_model(NAME, depth=5).to(dtype)
    x, y = torch.randn(BATCH, 3, 224, 224, dtype=dtype), torch.randint(1000, (BATCH,))
    if method == "forward":
        with torch.no_grad():
            return measure(lambda: model(x), existing=[model, x, y]).peak
    if method == "FPS":
        run = lambda: fps.select(model, [x], budget=fps.PerNeuron(4), micro_batch=1, progress=False)  # noqa: E731
        return measure(run, existing=[model, x, y]).peak
    if method == "GPS":
        run = lambda: fps.gps_select(model, [(x, y)], loss="cross_entropy", budget=fps.PerNeuron(4), progress=False)  # noqa: E731
        return measure(run, existing=[model, x, y]).peak
    in_8_bits = method.endswith("-8bit")
    keeping = nullcontext()
    if method.startswith("attach"):
        selection = fps.select(model, [x], budget=fps.PerNeuron(4), progress=False)
        tuner = fps.attach(model, selection, keep_bits=8 if in_8_bits else None)
        optimizer = fps.MaskedAdamW(tuner)
    else:
        model = _with_peft(model) if method.startswith("LoRA") else model
        keeping = fps.kept() if in_8_bits else keeping
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            with keeping:
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()

    return measure(steps, existing=[model, x, y]).peak


def _with_peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    trained = [p for name, p in model.named_parameters() if name in default_dense(Survey.of(model))]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=lora_layers(model), modules_to_save=["head"])
    wrapped: nn.Module = peft.get_peft_model(model, config)
    for p in trained:
        p.requires_grad_(True)
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_five_percent_of_reality(dtype):
    pytest.importorskip("peft")

    def shallow() -> nn.Module:
        return timm.create_model(NAME, depth=5)

    planned = fps.memory.plan(shallow, BATCH, dtype=dtype, input_size=(3, 224, 224), methods=METHODS)
    assert [cost.method for cost in planned.costs] == list(METHODS)
    for cost in planned.costs:
        assert cost.peak == pytest.approx(really(cost.method, dtype), rel=0.05), cost.method
        parts = cost.weights + cost.activations + cost.gradients + cost.optimizer
        assert cost.peak <= 1.6 * parts
    assert planned["attach"].gradients < planned["full"].gradients / 5
    assert planned["attach"].optimizer < planned["full"].optimizer / 3
    for method in ("full", "LoRA", "attach"):
        assert (
            planned[f"{method}-8bit"].activations < (0.55 if dtype == torch.float32 else 0.85) * planned[method].activations
        )


def test_largest_batch_is_the_last_that_fits():
    memory = 60 * 2**20
    planned = fps.memory.plan(NAME, 2, memory=memory, methods=("forward", "full", "attach"))
    for method in ("forward", "attach"):
        largest = planned[method].largest_batch
        assert largest > 0
        assert fps.memory.plan(NAME, largest, methods=[method])[method].peak <= memory
        assert fps.memory.plan(NAME, largest + 1, methods=[method])[method].peak > memory
    assert planned["full"].largest_batch == 0
    text = str(planned)
    assert "largest batch in 60.0 MiB" in text
    assert text.splitlines()[0] == f"{NAME}, batch 2, float32"


def test_own_models_and_forwards():
    planned = fps.memory.plan(
        Classifier, 3, input_size=(3, 8, 8), forward=lambda model, x: model(x), methods=["FPS", "attach"], memory=10**9
    )
    assert planned.model == "Classifier"
    assert planned["FPS"].largest_batch is None
    with pytest.raises(KeyError):
        planned["full"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"memory": 0}, "memory must be"),
        ({"k": 0}, "k must be"),
        ({"methods": ["QLoRA"]}, "methods must be of forward, FPS"),
        ({"model": "vit_gigantic"}, "timm has no model 'vit_gigantic'"),
        ({"model": "vit_tinny"}, "timm has no model 'vit_tinny': did you mean 'vit_tiny_patch16_224'"),
        ({"model": "nothing"}, "timm has no model 'nothing': timm.list_models\\(\\) names them all"),
        ({"model": Classifier}, "input_size is needed"),
    ],
)
def test_bad_input(arguments, match):
    with pytest.raises(ValueError, match=match):
        fps.memory.plan(**({"model": NAME, "batch_size": 1} | arguments))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_choosing_sample_by_sample_is_that_of_all_samples(count):
    from fps_kernels.memory.measuring import simulated
    from fps_kernels.memory.rehearsal import Occasion, rehearsal

    with simulated() as build:
        occasion = Occasion((3, 8, 8), torch.float32, 2, None)
        model = build(Classifier)
        x, y = occasion.batch(count)
        run = lambda: fps.select(model, [x], budget=fps.PerNeuron(2), micro_batch=1, progress=False)  # noqa: E731
        assert rehearsal("FPS", model, occasion)(count).peak == measure(run, existing=[model, x, y]).peak


def test_an_input_size_that_timm_does_not_tell(monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg_value", lambda name, key: None)
    with pytest.raises(ValueError, match="input_size is needed, such as \\(3, 224, 224\\): timm does not say what vit_tiny"):
        fps.memory.plan(NAME, 1)


def test_few_blocks_tell_of_all():
    """Of a model with a run of equal blocks the plan is that of taking steps with all of them."""
    from fps_kernels.memory.extrapolation import Theatre, largest_batch
    from fps_kernels.memory.measuring import simulated
    from fps_kernels.memory.rehearsal import Occasion

    for name, size, methods in (
        ("test_vit", 160, ("forward", "GPS", "full", "attach-8bit")),
        ("convnext_atto", 64, ("attach",)),
    ):
        occasion = Occasion((3, size, size), torch.float32, 4, None)
        with simulated():
            few = Theatre(lambda name=name: timm.create_model(name), occasion)
            whole = Theatre(lambda name=name: timm.create_model(name), occasion)
            assert few.runs
            whole.runs = []
            for method in methods:
                steps, expected = few.of(method), whole.of(method)
                for batch in (1, 5):
                    assert steps(batch).peak == pytest.approx(expected(batch).peak, rel=0.01), (name, method, batch)
                    assert steps(batch).weights == expected(batch).weights
                memory = 2 * expected(4).peak
                assert abs(largest_batch(steps, 2, memory) - largest_batch(expected, 2, memory)) <= 1, (name, method)


def test_a_model_that_asks_for_its_blocks_by_number():
    """It cannot be shortened; all of it is taken."""

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(9):
                x = self.blocks[i](x)
            return self.head(x)

    planned = fps.memory.plan(Numbered, 2, input_size=(8,), methods=["forward", "full"])
    assert planned["full"].weights == 4 * sum(p.numel() for p in Numbered().parameters())


@pytest.mark.parametrize("jump", [0, 3])
def test_peaks_that_are_no_straight_line(jump):
    """The answer is confirmed on both sides whatever the peaks do."""
    from fps_kernels.memory.extrapolation import Steps, largest_batch
    from fps_kernels.memory.rehearsal import Parts

    def peak(n: int) -> int:
        return 1000 + 10 * n + 40 * jump * (n // 7)

    steps = Steps(lambda n: Parts((peak(n), 1500), 1000, 10 * n, 0, 0), [], [])
    for memory in (900, 1499, 1500, 1777, 5000):
        largest = largest_batch(steps, 4, memory)
        fits = [n for n in range(1, 600) if max(peak(n), 1500) <= memory]
        assert largest == max(fits, default=0), memory
