"""What a run is given, and what it says of an update."""

import pytest
import torch

from benchmarks.accuracy import runs
from fps_kernels.demo.data import Split, Task


def test_update_summary_of_known_matrices():
    before = {"blocks.0.w": torch.ones(4, 6), "head.weight": torch.ones(2, 2)}
    change = torch.zeros(4, 6)
    change[0, 1], change[2, 5] = 0.5, -0.5
    found = runs.update_summary(before, {"blocks.0.w": before["blocks.0.w"] + change, "head.weight": torch.zeros(2, 2)})
    assert found == {
        "effective_rank": pytest.approx(2.0), "rank_share": pytest.approx(0.5), "columns": pytest.approx(2 / 6, abs=1e-5),
        "largest_column": pytest.approx(0.5), "relative_norm": pytest.approx((0.5 / 24) ** 0.5, abs=1e-5),
    }  # fmt: skip
    assert runs.update_summary(before, before) == {}


def test_held_out_images_are_of_the_training_images_and_of_every_class():
    images = torch.arange(20).view(20, 1, 1, 1).float()
    task = Task("t", 2, Split(images, torch.arange(20) % 2), Split(images + 100, torch.zeros(20).long()), (0.0,), (1.0,))
    parts = runs.held_out(task, seed=1, share=0.3)
    assert len(parts.train) == 14
    assert parts.test.target.bincount().tolist() == [3, 3]
    assert sorted(torch.cat([parts.train.images, parts.test.images]).flatten().tolist()) == list(range(20))
    assert not torch.equal(parts.test.images, runs.held_out(task, seed=2, share=0.3).test.images)
