"""The integrations on a device."""

import copy

import torch
import transformers

import fps_kernels as fps
from tests.support.models import Classifier, labelled
from tests.support.training import RATES, loss_of


def test_a_language_model(device):
    """GPT-2, whose matrices are transposed, with tied embeddings: gradients and choices are those of the CPU."""
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(60, (2, 8))
    stats = fps.calibrate(model, [{"input_ids": tokens}])
    selection = fps.select(model, stats=stats, budget=fps.PerNeuron(2))
    there = copy.deepcopy(model).to(device)
    moved = fps.calibrate(there, [{"input_ids": tokens}])
    for name, one in stats.items():
        torch.testing.assert_close(moved[name].norm.cpu(), one.norm, rtol=1e-4, atol=1e-6)
    grads = []
    for one in (model, there):
        tuner = fps.attach(one, selection)
        ids = tokens.to(next(one.parameters()).device)
        one(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.cpu() for name, p in tuner.compact.items()})
    for name, grad in grads[0].items():
        assert float((grads[1][name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-8, name


def test_an_average_of_weights(device):
    """Of torch: a copy of the model that follows it through ``.data``."""
    model, batch = Classifier().to(device), labelled(device=device)
    tuner = fps.attach(model, fps.select(model, [batch[0]], budget=fps.PerTensor(0.1)))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = fps.MaskedAdamW(tuner, **RATES)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append(tuner.compact["hidden.weight"].detach().clone())
    average(batch[0])
    held = average.module.state_dict()["hidden.weight"][tuner.selection["hidden.weight"].mask().to(device)]
    torch.testing.assert_close(held, torch.stack(seen).mean(0))
