"""What is done with one model, and what must hold."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.selection import Selection
from fps_kernels.weights.survey import Survey

STEPS, BUDGET = 3, 2
TOLERANCE = 1e-5  # of a weight's gradients, over the largest of them
FLOOR = 1e-6  # of the largest gradient of the whole model: what is smaller is rounding of what cancels


@dataclass
class Sample:
    """A model and what it is run on.

    Attributes:
        model: with random weights.
        batch: arguments by name, or one tensor.
    """

    model: nn.Module
    batch: Any

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output. What it has cached in evaluation mode, such as the biases of an attention, it makes anew."""
        model.train().eval()
        return model(**batch) if isinstance(batch, Mapping) else model(batch)


@dataclass
class Outcome:
    """What was found of one model.

    Attributes:
        family: its library.
        model: its name there.
        entries: of its matrices.
        eligible: share of them that there is to choose from.
        skipped: share of the entries by the reason why there is not.
        checks: which held, by name.
        choose: seconds, the better of two.
        pass_: seconds of a forward and a backward pass, likewise.
        tune: seconds of the steps.
        error: what stopped it, if anything did.
    """

    family: str
    model: str
    entries: int = 0
    eligible: float = 0.0
    skipped: dict[str, float] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    choose: float = 0.0
    pass_: float = 0.0
    tune: float = 0.0
    error: str = ""

    def row(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor of an output that has a gradient."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def loss_of(output: Any) -> Tensor:
    """A sum of all of an output, each number with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    parts = [(t.float() * torch.randn(t.shape, generator=generator)).sum() / t.numel() ** 0.5 for t in tensors_of(output)]
    return torch.stack(parts).sum()


def dense_gradients(sample: Sample) -> tuple[dict[str, Tensor], float]:
    """Gradients of all parameters, and the seconds that it took."""
    sample.model.requires_grad_(True)
    begin = time.perf_counter()
    loss_of(sample.forward(sample.model, sample.batch)).backward()
    seconds = time.perf_counter() - begin
    found = {name: p.grad for name, p in sample.model.named_parameters() if p.grad is not None}
    sample.model.zero_grad()
    return found, seconds


def gradients_match(tuner: fps.Tuner, selection: Selection, dense: dict[str, Tensor]) -> bool:
    """Whether compact gradients are the dense ones at the chosen entries."""
    largest = max((float(g.abs().max()) for g in dense.values() if g.numel()), default=0.0)
    for name, value in tuner.compact.items():
        expected = selection[name].of(dense[name]) if name in dense else torch.zeros_like(value)
        found = torch.zeros_like(value) if value.grad is None else value.grad
        allowed = TOLERANCE * float(expected.abs().max() if expected.numel() else 0) + FLOOR * largest
        if float((found - expected).abs().max() if expected.numel() else 0) > allowed:
            return False
    return True


def examine(family: str, name: str, make: Callable[[], Sample]) -> Outcome:
    """Do all that is done with a model, and note what held."""
    outcome = Outcome(family, name)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample = make()
            sample.model.eval()
            _examine(outcome, sample)
    except Exception as error:  # of any library: it is part of the result
        outcome.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return outcome


def _examine(outcome: Outcome, sample: Sample) -> None:
    model, batch = sample.model, sample.batch
    dense, first = dense_gradients(sample)
    outcome.pass_ = min(first, dense_gradients(sample)[1])
    selection, outcome.choose = _selection(sample)
    outcome.choose = min(outcome.choose, _selection(sample)[1])
    matrices = Survey.of(model).matrices
    outcome.entries = sum(p.numel() for p in matrices.values())
    outcome.eligible = sum(matrices[name].numel() for name in selection) / outcome.entries
    for name, reason in selection.skipped.items():
        outcome.skipped[reason] = outcome.skipped.get(reason, 0.0) + matrices[name].numel() / outcome.entries
    before = model.state_dict()  # with its versions
    for name, t in before.items():
        before[name] = t.detach().clone()
    tuner = fps.attach(model, selection)
    loss_of(sample.forward(model, batch)).backward()
    checks = outcome.checks
    checks["gradients"] = gradients_match(tuner, selection, dense)
    checks["no dense gradient"] = all(p.grad is None for p in matrices.values())
    optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
    begin = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(sample.forward(model, batch)).backward()
        optimizer.step()
    outcome.tune = time.perf_counter() - begin
    checks["frozen bits"] = _frozen(before, model.state_dict(), selection)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        fps.save_delta(tuner, path)
        tuned = {name: t.detach().clone() for name, t in model.state_dict().items()}
        tuner.detach()
        delta = fps.load_delta(path)
    checks["moved"] = any(not torch.equal(before[name], tuned[name]) for name in selection)
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(before)
    delta.apply_(fresh)
    checks["applied"] = _same(tuned, fresh.state_dict())
    delta.revert_(fresh)
    checks["reverted"] = _same(before, fresh.state_dict())


def _selection(sample: Sample) -> tuple[Selection, float]:
    begin = time.perf_counter()
    budget = fps.PerNeuron(BUDGET)
    found = fps.select(sample.model, [sample.batch], budget=budget, dense=[], forward=sample.forward, progress=False)
    return found, time.perf_counter() - begin


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(t, b[name]) for name, t in a.items())


def _frozen(before: Mapping[str, Tensor], after: Mapping[str, Tensor], selection: Selection) -> bool:
    for name, t in before.items():
        if name in selection:
            mask = selection[name].mask()
            if not torch.equal(t[~mask], after[name][~mask]):
                return False
        elif name not in selection.tied and not torch.equal(t, after[name]):
            return False
    return True
