"""The arithmetic of the tables is right."""

import math
from statistics import NormalDist

import pytest
import torch

from benchmarks.accuracy import table
from benchmarks.accuracy.lines import to_bits


def line(method: str, seed: int, right: list[bool], k: int | None = 4, dataset: str = "one") -> dict[str, object]:
    bits = to_bits(torch.tensor(right))
    share = sum(right) / len(right)
    return {
        "split": "test", "dataset": dataset, "method": method, "k": k, "seed": seed, "lr": 1e-3, "accuracy": share,
        "correct": sum(right), "total": len(right), "bits": bits, "trained": 1, "update": {}, "loss": 0.0,
    }  # fmt: skip


def test_paired_differences():
    lines = [
        line("random", 1, [True, True, False, False]), line("FPS", 1, [True, True, True, False]),
        line("random", 2, [True, False, False, False]), line("FPS", 2, [True, False, False, False]),
        line("random", 3, [True, False, False, False]), line("FPS", 3, [True, True, True, False]),
        line("FPS", 4, [True, True, True, True]),  # has no pair
        line("full", 1, [False, False, False, False], k=None),
    ]  # fmt: skip
    runs = table.paired_runs(lines, "FPS", "random", {4})
    assert runs.count == 3
    assert runs.mean == pytest.approx(0.25)
    assert runs.error == pytest.approx(0.25 / math.sqrt(3))  # of 0.25, 0, 0.5
    assert runs.half == pytest.approx(4.302653 * runs.error)  # Student's t with two degrees of freedom
    images = table.paired_images(lines, "FPS", "random", {4})
    per_image = torch.tensor([0, 1 / 3, 2 / 3, 0], dtype=torch.float64)
    assert images.mean == pytest.approx(0.25)
    assert images.error == pytest.approx(float(per_image.std()) / 2)
    assert images.half == pytest.approx(NormalDist().inv_cdf(0.975) * images.error)
    assert table.paired_runs(lines, "full", "random", {4}).mean == pytest.approx(-0.5)
    more = [*lines, line("random", 1, [True, False, False, False], k=1)]
    both = table.paired_runs(more, "full", "random", {1, 4})  # one run of full tuning is one observation
    assert (both.count, both.mean) == (1, pytest.approx(-0.375))
    assert table.paired_runs(more, "random", "full", {1, 4}).count == 1
    assert "FPS" in table.render(lines)


def test_concentration_is_correlated_over_methods():
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    lines = [
        {
            "dataset": dataset,
            "method": method,
            "accuracy": base + share,
            "update": {"columns": share, "effective_rank": -share, "largest_column": share**2, "relative_norm": share},
        }
        for dataset, base in (("one", 0.1), ("two", 0.5))
        for method, share in shares.items()
    ]
    lines.append({"dataset": "one", "method": "no update", "accuracy": 0.9, "update": {}})
    head, body = table.concentration_rows(lines)
    found = {row[0]: row[1:] for row in body}
    assert found["columns that changed"][0] == "+1.00"
    assert found["effective rank"][0] == "-1.00"
    assert found["columns that changed"][2] == "4"
    assert len(head) == len(body[0])
