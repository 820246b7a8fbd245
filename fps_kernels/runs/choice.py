"""From the options of a choice to a selection."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fps_kernels.choosing.budgets import Budget, Global, PerNeuron, PerTensor
from fps_kernels.choosing.calibration import calibrate
from fps_kernels.choosing.scorers import FPS, GrowthDriven, Magnitude, Random, Scorer, Wanda
from fps_kernels.choosing.select import select
from fps_kernels.choosing.statistics import ActivationStats
from fps_kernels.memory import measure
from fps_kernels.runs.images import ImageSet, Reading, sample
from fps_kernels.runs.models import Loaded
from fps_kernels.runs.processes import Processes
from fps_kernels.runs.progress import progress_bar, speaks
from fps_kernels.runs.splits import Source, training_images
from fps_kernels.runs.views import as_seen_by
from fps_kernels.selection import Selection

SCORERS = ("fps", "wanda", "magnitude", "random", "growth")


@dataclass(frozen=True)
class Choice:
    """What to choose, and from which images; the options of ``fps-kernels select``. The scorer is one of :data:`SCORERS`."""

    scorer: str
    anchor: Path | None
    k: int | None
    density: float | None
    across: bool
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    dense: Sequence[str] | None
    samples: int
    batch_size: int
    micro_batch: int | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "dense"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, tuple(patterns) if patterns else None)
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {self.scorer!r}")
        if self.k is not None and self.density is not None:
            raise ValueError("give --k or --density, not both")
        if self.across and self.density is None:
            raise ValueError("--global goes with --density")
        if (self.scorer == "growth") != (self.anchor is not None):
            raise ValueError("--scorer growth and --anchor go together: growth is over what the anchor's images give")
        if self.anchor is not None and not self.anchor.exists():
            raise ValueError(f"--anchor: there is no folder or file {self.anchor}")
        self.budget()

    @property
    def most(self) -> int:
        """Images that are looked at, if there are as many; one batch where they only show which weights are used."""
        return self.batch_size if self.scorer in ("magnitude", "random") else self.samples

    def budget(self) -> Budget:
        """How many entries.

        Raises:
            ValueError: a density outside (0, 1].
        """
        if self.density is None:
            return PerNeuron(self.k or 1)
        return Global(self.density) if self.across else PerTensor(self.density)


def entries_per_neuron(choice: Choice, selection: Path | None, model: nn.Module) -> float:
    """How many entries an output neuron gets in the mean: those of a selection file, or what a choice asks for.

    Raises:
        ValueError: the file is no selection.
    """
    if selection is not None:
        chosen = Selection.load(selection)
        return chosen.nnz / max(1, sum(w.layout.shape[0] for w in chosen.values()))
    if choice.density is None:
        return choice.k or 1
    weights = [p for p in model.parameters() if p.dim() > 1]
    return choice.density * sum(p.numel() for p in weights) / max(1, sum(p.shape[0] for p in weights))


@dataclass(frozen=True)
class Chosen:
    """A selection and what it cost.

    Attributes:
        selection: the choice.
        seconds: of the passes and the choice, with reading the images.
        peak_memory: bytes: most that live tensors held, weights included; on a GPU, what torch's allocator had given out.
        images: that were looked at.
    """

    selection: Selection
    seconds: float
    peak_memory: int
    images: int


def choose(loaded: Loaded, images: ImageSet, choice: Choice, reading: Reading, processes: Processes | None = None) -> Chosen:
    """Choose the entries of a model that are worth tuning on these images.

    Raises:
        ValueError: see :func:`fps_kernels.select`; images that cannot be read.
    """
    processes = Processes() if processes is None else processes
    # Batches of a model that stays in its files are read all at once, then go through it: select() tells how far they are.
    with progress_bar(shown=loaded.files is None) as progress:

        def batches(source: ImageSet, label: str) -> Iterator[Tensor]:
            count, places = sample(len(source), choice.most, choice.batch_size, choice.seed)
            task = progress.add_task(label, total=count, status="")
            if min(choice.most, len(source)) < processes.size:
                raise ValueError(f"{processes.size} processes look at fewer images: start fewer, or raise --samples")
            own = [batch for batch in places() if len(batch) > processes.rank]
            for inputs, _ in reading.batches(source, as_seen_by(loaded.config), lambda: processes.parts(own), choice.seed):
                yield inputs.to(loaded.device, loaded.dtype)
                progress.advance(task)

        def chosen() -> Selection:
            return select(
                loaded.model,
                batches(images, "choose"),
                scorer=_scorer(choice, lambda: _anchor(loaded, choice, batches, processes)),
                budget=choice.budget(),
                include=choice.include,
                exclude=choice.exclude if loaded.files is None else [*(choice.exclude or ()), *loaded.not_linear],
                dense=choice.dense if loaded.files is None else choice.dense or loaded.heads,
                checkpoint=loaded.files,
                micro_batch=choice.micro_batch,
                progress=None if loaded.files is not None and speaks() else False,
            )

        from torch import _dynamo  # noqa: F401  select() needs it; the seconds of its first import are none of the choice's

        start = time.perf_counter()
        if loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(loaded.device)
            selection = chosen()
            peak = torch.cuda.max_memory_allocated(loaded.device)
        else:
            report = measure(chosen, existing=[loaded.model])
            selection, peak = report.result, report.peak
        return Chosen(selection, time.perf_counter() - start, peak, min(choice.most, len(images)))


def _scorer(choice: Choice, anchor: Callable[[], ActivationStats]) -> Scorer:
    match choice.scorer:
        case "wanda":
            return Wanda()
        case "magnitude":
            return Magnitude()
        case "random":
            return Random(choice.seed)
        case "growth":
            return GrowthDriven(anchor())
        case _:
            return FPS()


def _anchor(
    loaded: Loaded, choice: Choice, batches: Callable[[ImageSet, str], Iterator[Tensor]], processes: Processes
) -> ActivationStats:
    assert choice.anchor is not None
    if choice.anchor.is_file():
        return ActivationStats.load(choice.anchor, loaded.device)
    images = training_images(Source(str(choice.anchor)))
    with loaded.present():
        stats = calibrate(loaded.model, batches(images, "anchor"), micro_batch=choice.micro_batch, progress=False)
    if processes.size > 1:
        stats.all_reduce()
    return stats
