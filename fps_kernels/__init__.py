"""Choose the few weights worth tuning in one forward pass, and tune only those.

selection = fps.select(model, data, scorer=fps.FPS(), budget=fps.PerNeuron(1))
tuner = fps.attach(model, selection)
optimizer = fps.MaskedAdamW(tuner, lr=1e-3)
"""

from fps_kernels import gps, memory
from fps_kernels.budgets import Global, LikeLoRA, PerNeuron, PerTensor
from fps_kernels.calibration import ActivationStats, calibrate
from fps_kernels.choosing import select
from fps_kernels.delta import Delta, diff, load_delta, merge, save_delta
from fps_kernels.functional import column_norm, score_topk
from fps_kernels.gps import gps_select
from fps_kernels.ops import BackendUnavailableError, backend_for, use_backend
from fps_kernels.optim import MaskedAdamW, masked_parameters
from fps_kernels.scorers import FPS, GrowthDriven, Magnitude, Random, Wanda
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.tuning import Tuner, attach

__version__ = "0.1.0"

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
    "load_delta",
    "masked_parameters",
    "memory",
    "merge",
    "save_delta",
    "score_topk",
    "select",
    "use_backend",
]
