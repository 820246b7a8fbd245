"""Choose the few weights worth tuning in one forward pass, and tune only those.

selection = fps.select(model, data, scorer=fps.FPS(), budget=fps.PerNeuron(1))
tuner = fps.attach(model, selection)
optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
"""

from fps_kernels import memory
from fps_kernels._version import __version__ as __version__
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
