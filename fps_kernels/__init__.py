"""Choose the few weights worth tuning in one forward pass, and tune only those.

selection = fps.select(model, data, scorer=fps.FPS(), budget=fps.PerNeuron(1))
tuner = fps.attach(model, selection)
optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
"""

import importlib
from typing import TYPE_CHECKING, Any

from fps_kernels._version import __version__ as __version__

if TYPE_CHECKING:
    from fps_kernels import memory
    from fps_kernels.choosing import gps
    from fps_kernels.choosing.budgets import Global, LikeLoRA, PerNeuron, PerTensor
    from fps_kernels.choosing.calibration import calibrate
    from fps_kernels.choosing.drop_in import column_norm, score_topk
    from fps_kernels.choosing.gps import gps_select
    from fps_kernels.choosing.scorers import FPS, GrowthDriven, Magnitude, Random, Wanda
    from fps_kernels.choosing.select import select
    from fps_kernels.choosing.statistics import ActivationStats
    from fps_kernels.deltas.delta import Delta
    from fps_kernels.deltas.dense import merge_into_dense
    from fps_kernels.deltas.making import diff, load_delta, save_delta
    from fps_kernels.deltas.merging import merge
    from fps_kernels.keeping.kept import kept
    from fps_kernels.ops import BackendUnavailableError, backend_for, use_backend
    from fps_kernels.selection import Selection, WeightSelection
    from fps_kernels.tuning.attaching import attach, tuner_of
    from fps_kernels.tuning.groups import masked_parameters
    from fps_kernels.tuning.masked_adamw import MaskedAdamW
    from fps_kernels.tuning.tuner import Tuner
    from fps_kernels.weights.streaming import streamed

__all__ = [
    "FPS",
    "ActivationStats",
    "BackendUnavailableError",
    "Delta",
    "Global",
    "GrowthDriven",
    "LikeLoRA",
    "Magnitude",
    "MaskedAdamW",
    "PerNeuron",
    "PerTensor",
    "Random",
    "Selection",
    "Tuner",
    "Wanda",
    "WeightSelection",
    "attach",
    "backend_for",
    "calibrate",
    "column_norm",
    "diff",
    "gps",
    "gps_select",
    "kept",
    "load_delta",
    "masked_parameters",
    "memory",
    "merge",
    "merge_into_dense",
    "save_delta",
    "score_topk",
    "select",
    "streamed",
    "tuner_of",
    "use_backend",
]

# Names are imported when they are first asked for, so that whoever only wants the version or a help text does not wait for
# torch.
_NAMES = {
    "choosing.budgets": (
        "Global",
        "LikeLoRA",
        "PerNeuron",
        "PerTensor",
    ),
    "choosing.calibration": ("calibrate",),
    "choosing.drop_in": (
        "column_norm",
        "score_topk",
    ),
    "choosing.gps": ("gps", "gps_select"),
    "choosing.scorers": (
        "FPS",
        "GrowthDriven",
        "Magnitude",
        "Random",
        "Wanda",
    ),
    "choosing.select": ("select",),
    "choosing.statistics": ("ActivationStats",),
    "deltas.delta": ("Delta",),
    "deltas.dense": ("merge_into_dense",),
    "deltas.making": (
        "diff",
        "load_delta",
        "save_delta",
    ),
    "deltas.merging": ("merge",),
    "keeping.kept": ("kept",),
    "ops": (
        "BackendUnavailableError",
        "backend_for",
        "use_backend",
    ),
    "selection": (
        "Selection",
        "WeightSelection",
    ),
    "tuning.attaching": (
        "attach",
        "tuner_of",
    ),
    "tuning.groups": ("masked_parameters",),
    "tuning.masked_adamw": ("MaskedAdamW",),
    "tuning.tuner": ("Tuner",),
    "weights.streaming": ("streamed",),
}
_ROOMS = ("choosing", "deltas", "keeping", "memory", "ops", "selection", "storage", "tuning", "weights")
_PLACES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(f"{__name__}.{_PLACES[name]}")
    globals()[name] = found if name == "gps" else getattr(found, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
