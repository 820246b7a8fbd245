"""Deltas are made of models on a device, and applied to some there; the bits are those of the CPU's."""

import copy

import pytest
import torch

import fps_kernels as fps
from tests.support.models import Classifier, labelled
from tests.support.training import RATES, copy_of, selected, train


def tuned(model, device):
    """The model, trained for two steps, and its tuner."""
    tuner = fps.attach(model, selected(model))
    train(model, fps.MaskedAdamW(tuner, **RATES), [labelled(device=device) for _ in range(2)])
    return tuner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_applied_and_taken_back(device, dtype, tmp_path):
    model = Classifier().to(device, dtype)
    base = copy.deepcopy(model)
    before = copy_of(base)
    tuner = tuned(model, device)
    fps.save_delta(tuner, tmp_path / "task.safetensors")
    tuner.detach()
    delta = fps.load_delta(tmp_path / "task.safetensors")
    for where in (base, copy.deepcopy(base).cpu()):
        delta.apply_(where)
        for name, p in model.named_parameters():
            assert torch.equal(where.get_parameter(name).cpu(), p.cpu()), name
        delta.revert_(where)
        for name, p in where.named_parameters():
            assert torch.equal(p.detach().cpu(), before[name].cpu()), name


def test_the_file_holds_what_the_cpu_writes(device, tmp_path):
    model = Classifier().to(device)
    tuner = tuned(model, device)
    fps.save_delta(tuner, tmp_path / "there.safetensors")
    here = copy.deepcopy(model).cpu()
    fps.save_delta(fps.tuner_of(here), tmp_path / "here.safetensors")
    first, second = (fps.load_delta(tmp_path / f"{where}.safetensors") for where in ("there", "here"))
    assert first.base == second.base
    for mine, theirs in ((first.values, second.values), (first.dense, second.dense)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_selections_and_statistics_are_loaded_to_a_device(device, tmp_path):
    model = Classifier().to(device)
    selection = selected(model)
    selection.save(tmp_path / "selection.safetensors")
    loaded = fps.Selection.load(tmp_path / "selection.safetensors", device)
    for name, entries in selection.items():
        assert torch.equal(loaded[name].columns, entries.columns)
        assert loaded[name].columns.device == entries.columns.device
    assert loaded.overlap(selection) == 1
    assert (loaded | selection).nnz == (loaded & selection).nnz == selection.nnz
    stats = fps.calibrate(model, [labelled()[0]])
    stats.save(tmp_path / "stats.safetensors")
    again = fps.ActivationStats.load(tmp_path / "stats.safetensors", device)
    assert all(torch.equal(again[name].norm, one.norm) for name, one in stats.items())
