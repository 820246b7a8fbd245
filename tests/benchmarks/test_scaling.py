"""The scaling benchmark: its fits are right, and its smallest sizes run."""

import math

import pytest
import torch
from timm.models import VisionTransformer

import fps_kernels as fps
from benchmarks import scaling


def tiny(img_size: int = 32, **_: object) -> VisionTransformer:
    return VisionTransformer(img_size=img_size, patch_size=16, embed_dim=32, depth=1, num_heads=2)


def test_power_laws_are_found():
    exponent, error, factor = scaling.power_law([1.0, 2.0, 4.0, 8.0], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exponent == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-6)
    assert factor == pytest.approx(3)
    assert math.isnan(scaling.power_law([1.0, 2.0], [1.0, 2.0])[1])


def test_sizes_on_paper_are_not_fitted():
    shared = {"sweep": "parameters", "quantity": "memory", "method": "FPS"}
    rows = [{**shared, "x": x, "value": 5 * x, "on_paper": False} for x in (1, 10, 100)]
    rows.append({**shared, "x": 1000, "value": 1, "on_paper": True})
    (fit,) = scaling.fits(rows)
    assert fit["exponent"] == pytest.approx(1)
    assert fit["points"] == 3


def test_the_22b_shape_has_22b_parameters():
    assert scaling.parameters(scaling.vit_22b) == pytest.approx(21.8e9, rel=0.01)


def test_small_sizes_run(monkeypatch):
    monkeypatch.setattr(scaling.timm, "create_model", lambda name, **more: tiny(**more))
    sizes = scaling.Sizes(
        planned=("FPS", "attach"),
        models=("ViT-Ti/16",),
        on_paper=("ViT-g/14",),
        batches=(1, 2),
        images=(224,),
        run_models=("ViT-Ti/16",),
        run_batches=(1, 2),
        run_images=(32, 64),
        ks=(1, 2),
        densities=(0.01, 0.1),
        batch=1,
        rounds=1,
    )
    monkeypatch.setattr(scaling, "tiny", tiny, raising=False)
    monkeypatch.setitem(scaling.SIZES, "ViT-Ti/16", "tiny")
    torch.manual_seed(0)
    every = [run for sweep in scaling.runs(sizes) for run in sweep]
    assert {run.sweep for run in every} == {"parameters", "batch", "tokens", "k", "density"}
    last = every[-1]
    rows = last.memory()
    assert [row["method"] for row in rows] == ["FPS", "attach"]
    assert all(row["value"] > row["beyond_weights"] > 0 for row in rows)
    assert isinstance(last.select(), fps.Selection)
    for call in last.contestants().values():
        call()
