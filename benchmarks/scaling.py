"""How memory and time grow: ``python -m benchmarks.scaling [--quick]``.

Choosing by FPS (in micro-batches of one image), choosing by GPS, and a training step, against parameters (ViT-Ti to ViT-H),
batch, tokens, entries a neuron and density; to each the exponent of a power law, fitted by least squares of the logarithms.

Memory is the peak of live tensors and exact. Where nothing depends on which entries are chosen it is simulated, so that the
large models need no large machine; ViT-g and a model of ViT-22B's shape (Dehghani et al., 2023) are on paper only and left
out of the fits. ``attach`` counts every column as needed there: an upper bound. Against entries and density it is measured
on steps that were really run. Weights are random, so that a choice spreads over more columns than that of a pretrained
network. Times are medians over rounds in which all sizes take turns; they are as noisy as the machine.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

import fps_kernels as fps
from benchmarks.shared import methods
from benchmarks.shared.measuring import alternate, save, table
from fps_kernels.memory import format_bytes, measure

Row = dict[str, Any]
Budget = fps.PerNeuron | fps.Global
SIZES = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
}
PATCH = 16
DEFAULT_K = 4
RUN_BATCH = 2


def vit_22b() -> nn.Module:
    """Width, depth and heads of ViT-22B in timm's architecture: what its blocks do in parallel is done in turn."""
    return timm.models.VisionTransformer(img_size=224, patch_size=14, embed_dim=6144, depth=48, num_heads=48)


ON_PAPER: dict[str, str | Callable[[], nn.Module]] = {"ViT-g/14": "vit_giant_patch14_224", "22B shape": vit_22b}


@dataclass(frozen=True)
class Sizes:
    """What is swept.

    Attributes:
        planned: methods that are simulated.
        models: simulated, by label.
        batches, images: simulated on ``base``: images a step, and pixels of an image's side.
        run_models, run_batches, run_images: the same, really run and timed, batches and images on ``small``.
        ks, densities: really run on ``small``.
        batch: of the sweep over models.
        rounds: of timing.
    """

    planned: tuple[str, ...] = ("forward", "FPS", "GPS", "full", "LoRA", "attach")
    models: tuple[str, ...] = tuple(SIZES)
    on_paper: tuple[str, ...] = tuple(ON_PAPER)
    base: str = "vit_base_patch16_224"
    batches: tuple[int, ...] = (1, 4, 16, 64)
    images: tuple[int, ...] = (112, 224, 448, 672)
    small: str = "vit_small_patch16_224"
    run_models: tuple[str, ...] = ("ViT-Ti/16", "ViT-S/16", "ViT-B/16")
    run_batches: tuple[int, ...] = (1, 2, 4, 8)
    run_images: tuple[int, ...] = (112, 224, 336, 448)
    ks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    densities: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    batch: int = 8
    rounds: int = 5


QUICK = Sizes(
    planned=("FPS", "attach"),
    models=("ViT-Ti/16", "ViT-S/16", "ViT-B/16"),
    on_paper=(),
    base="vit_tiny_patch16_224",
    batches=(1, 4, 16),
    images=(112, 224, 448),
    small="vit_tiny_patch16_224",
    run_models=("ViT-Ti/16", "ViT-S/16"),
    run_batches=(1, 2, 4),
    run_images=(112, 224, 336),
    ks=(1, 4, 16),
    densities=(0.001, 0.01, 0.1),
    batch=4,
    rounds=2,
)


def tokens(image: int) -> int:
    """Tokens of an image with the class token."""
    return (image // PATCH) ** 2 + 1


def parameters(create: Callable[[], nn.Module]) -> int:
    """Parameters of a model, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in create().parameters())


# ------------------------------------------------------------------------------------------------ simulated


def simulate(
    sweep: str, x: float, label: str, model: Callable[[], nn.Module], image: int, batch: int, planned: tuple[str, ...]
) -> list[Row]:
    """Peak memory of every method, calculated."""
    planned = fps.memory.plan(model, batch, methods=planned, k=DEFAULT_K, input_size=(3, image, image))
    return [
        {
            "sweep": sweep,
            "x": x,
            "label": label,
            "quantity": "memory",
            "method": cost.method,
            "value": cost.peak,
            "beyond_weights": cost.peak - cost.weights,
            "batch": batch,
            "simulated": True,
            "on_paper": label in ON_PAPER,
        }
        for cost in planned.costs
    ]


def simulations(sizes: Sizes) -> list[Row]:
    """Memory against parameters, batch and tokens."""
    rows = []
    for label in tqdm((*sizes.models, *sizes.on_paper), desc="simulated models"):
        known = SIZES.get(label) or ON_PAPER[label]
        create = partial(timm.create_model, known) if isinstance(known, str) else known
        rows += simulate("parameters", parameters(create), label, create, 224, sizes.batch, sizes.planned)
    base = partial(timm.create_model, sizes.base)
    for batch in sizes.batches:
        rows += simulate("batch", batch, f"{batch} images", base, 224, batch, sizes.planned)
    for image in sizes.images:
        create = partial(timm.create_model, sizes.base, img_size=image)
        rows += simulate("tokens", tokens(image), f"{image} px", create, image, sizes.batch, sizes.planned)
    return rows


# ------------------------------------------------------------------------------------------------ really run


@dataclass
class Run:
    """One size that is really run: the model that is chosen from, one that is tuned, and their input."""

    sweep: str
    x: float
    label: str
    name: str
    image: int = 224
    batch: int = RUN_BATCH
    budget: Budget = field(default_factory=lambda: fps.PerNeuron(DEFAULT_K))

    def __post_init__(self) -> None:
        self.model = timm.create_model(self.name, img_size=self.image).eval()
        self.images = torch.randn(self.batch, 3, self.image, self.image)
        self.target = torch.randint(1000, (self.batch,))
        self.stats = fps.calibrate(self.model, [self.images], progress=False)
        self.tuned = methods.attached(methods.fresh(self.model), self.choose())

    def forward(self) -> None:
        """A bare forward pass."""
        with torch.no_grad():
            self.model(self.images)

    def choose(self) -> fps.Selection:
        """The choice, once the statistics are there."""
        return fps.select(self.model, stats=self.stats, budget=self.budget)

    def select(self) -> fps.Selection:
        """Forward pass, statistics and choice."""
        return fps.select(self.model, [self.images], budget=self.budget, micro_batch=1, progress=False)

    def step(self) -> float:
        """One step of training."""
        return self.tuned.step(self.images, self.target)

    def contestants(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {"forward": self.forward, "FPS": self.select, "FPS, choice alone": self.choose, "attach": self.step}

    def row(self, quantity: str, method: str, value: float, **more: Any) -> Row:
        """One result."""
        shared = {"sweep": self.sweep, "x": self.x, "label": self.label, "quantity": quantity, "method": method}
        return {**shared, "value": value, **more, "batch": self.batch, "simulated": False, "on_paper": False}

    def memory(self) -> list[Row]:
        """Peaks of a selection and of the second step, which has the optimizer's state."""
        chosen = measure(self.select, existing=[self.model, self.images])
        weights = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        made = methods.attached(methods.fresh(self.model), self.choose())
        taken = measure(
            lambda: [made.step(self.images, self.target) for _ in range(2)], existing=[made.model, self.images, self.target]
        )
        return [
            self.row("memory", "FPS", chosen.peak, beyond_weights=chosen.peak - weights),
            self.row("memory", "attach", taken.peak, beyond_weights=taken.peak - weights),
        ]


def runs(sizes: Sizes) -> Iterable[list[Run]]:
    """The sweeps that are really run, one after the other, so that only one is in memory."""
    yield [Run("parameters", parameters(partial(timm.create_model, SIZES[m])), m, SIZES[m]) for m in sizes.run_models]
    yield [Run("batch", n, f"{n} images", sizes.small, batch=n) for n in sizes.run_batches]
    yield [Run("tokens", tokens(i), f"{i} px", sizes.small, image=i, batch=1) for i in sizes.run_images]
    yield [Run("k", k, f"k={k}", sizes.small, budget=fps.PerNeuron(k)) for k in sizes.ks]
    yield [Run("density", d, f"{d:.1%}", sizes.small, budget=fps.Global(d)) for d in sizes.densities]


def run(sizes: Sizes) -> list[Row]:
    """Times of every sweep, and memory where it depends on what is chosen."""
    rows = []
    for sweep in tqdm(runs(sizes), total=5, desc="sweeps that are run"):
        if sweep[0].sweep in ("k", "density"):
            rows += [row for r in sweep for row in r.memory()]
        every = {(i, method): call for i, r in enumerate(sweep) for method, call in r.contestants().items()}
        times = alternate({f"{i} {method}": call for (i, method), call in every.items()}, sizes.rounds)
        rows += [sweep[i].row("time", method, median(times[f"{i} {method}"])) for i, method in every]
    return rows


# ------------------------------------------------------------------------------------------------ fits


def power_law(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares of the logarithms: exponent, its standard error, and the factor before the power.

    Args:
        x: positive, at least two different ones.
        y: positive.
    """
    line = stats.linregress([math.log(v) for v in x], [math.log(v) for v in y])
    error = float(line.stderr) if len(x) > 2 else math.nan  # two points lie on a line
    return float(line.slope), error, math.exp(float(line.intercept))


def fits(rows: list[Row]) -> list[Row]:
    """The power law of every sweep, quantity and method, without the sizes on paper."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not row["on_paper"]:
            groups.setdefault((row["sweep"], row["quantity"], row["method"]), []).append(row)
    found = []
    for (sweep, quantity, method), group in groups.items():
        for of in ("value", "beyond_weights"):
            if of in group[0] and len({row["x"] for row in group}) > 1:
                exponent, error, factor = power_law([row["x"] for row in group], [row[of] for row in group])
                shared = {"sweep": sweep, "quantity": quantity, "method": method, "of": of}
                shared |= {"exponent": exponent, "standard_error": None if math.isnan(error) else error}
                found.append({**shared, "factor": factor, "points": len(group)})
    return found


def show(rows: list[Row], found: list[Row]) -> None:
    """Print every sweep with its exponents."""
    for sweep, quantity in dict.fromkeys((row["sweep"], row["quantity"]) for row in rows):
        here = [row for row in rows if (row["sweep"], row["quantity"]) == (sweep, quantity)]
        labels = list(dict.fromkeys(row["label"] + (" (on paper)" if row["on_paper"] else "") for row in here))
        body = []
        for method in dict.fromkeys(row["method"] for row in here):
            values = [row["value"] for row in here if row["method"] == method]
            cells = [format_bytes(v) if quantity == "memory" else f"{v:.1f} ms" for v in values]
            mine = [f for f in found if (f["sweep"], f["quantity"], f["method"]) == (sweep, quantity, method)]
            exponents = {f["of"]: f"{f['exponent']:.2f}" for f in mine}
            body.append([method, *cells, exponents.get("value", ""), exponents.get("beyond_weights", "")])
        kind = "simulated" if here[0]["simulated"] else "run"
        print(f"\n{quantity} against {sweep}, {kind}")
        print(table(["method", *labels, "exponent", "beyond weights"], body))


def main() -> None:
    """Simulate, run, fit, print, and write ``results/scaling.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    torch.manual_seed(0)
    rows = simulations(sizes)
    rows += run(sizes)
    found = fits(rows)
    show(rows, found)
    name, command = ("scaling_quick", " --quick") if options.quick else ("scaling", "")
    settings = {"base": sizes.base, "small": sizes.small, "k": DEFAULT_K, "rounds": sizes.rounds}
    save(name, "python -m benchmarks.scaling" + command, rows, settings=settings, fits=found)


if __name__ == "__main__":
    main()
