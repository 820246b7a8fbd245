"""Memory is measured on a device as on the CPU, in bytes of live tensors."""

import copy

import torch

import fps_kernels as fps
from tests.support.models import Classifier, images, labelled
from tests.support.training import RATES, loss_of, selected


def test_a_step_takes_as_much_everywhere(device):
    """But for what a device's own kernels of attention or convolution keep: of none here is there any."""
    model = Classifier()
    selection = selected(model)
    peaks = []
    for one, batch in ((model, labelled()), (copy.deepcopy(model).to(device), labelled(device=device))):
        tuner = fps.attach(one, selection)
        loss_of(one, batch).backward()
        peaks.append(fps.memory.measure(lambda one=one, batch=batch: loss_of(one, batch), existing=[one, *batch]))
        assert all(p.grad is not None for p in tuner.parameters())
        assert fps.MaskedAdamW(tuner, **RATES).step() is None
    assert abs(peaks[1].added - peaks[0].added) <= 0.25 * peaks[0].added


def test_a_choice_in_micro_batches_takes_less(device):
    model, x = Classifier().to(device), images(512, device)
    whole, pieces = (
        fps.memory.measure(lambda n=n: fps.select(model, [x], micro_batch=n, progress=False), existing=[model, x])
        for n in (None, 2)
    )
    assert pieces.added < whole.added / 4
    for name, entries in whole.result.items():
        assert torch.equal(entries.row_offsets, pieces.result[name].row_offsets)
