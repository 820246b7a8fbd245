"""What is said of choices before any tuning."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import analysis, runs


def test_analysis_of_choices(folders: Path):
    settings = runs.Settings("test_vit", None, 32, 0, anchor=folders / "two")
    occasion = runs.Workshop(settings).occasion(folders / "one", k=2, seed=1)
    rows, chosen = analysis.analyse(occasion, ["random", "FPS", "GPS"])
    for row in rows:
        assert row["overlap"][row["method"]] == 1
        assert 0 < row["columns"] <= 1
        assert 0 < row["gradient_steps_new_head"] < 1
    energy = {name: torch.ones(w.layout.parameter_shape) for name, w in chosen["FPS"].items()}
    assert analysis.caught(chosen["FPS"], energy) == pytest.approx(chosen["FPS"].density)
    assert json.dumps(rows)
