"""Telling base models apart."""

import hashlib

import torch
from torch import nn

from fps_kernels.ops.transfers import fetched
from fps_kernels.weights.matrix import computes_its_numbers, is_simulated
from fps_kernels.weights.survey import Survey, is_compact

_SAMPLED = 512  # entries of each parameter that are looked at


def fingerprint(model: nn.Module | Survey) -> str:
    """What identifies a base model: names and shapes of its parameters, and a sample of their values as bfloat16.

    At most 512 entries of each parameter are looked at, evenly spaced. A model that differs in no more than a few entries
    may have the same fingerprint; two trained models never do. In float32 and bfloat16 a model has the same one. Of
    quantised parameters only names and shapes count.
    """
    parameters = own_parameters(model)
    samples = {}
    for name, p in parameters.items():
        if p.is_floating_point() and p.numel() and not p.is_meta and not is_simulated(p) and not computes_its_numbers(p):
            n = min(_SAMPLED, p.numel())
            places = torch.arange(n, device=p.device) * p.numel() // n
            flat = p.detach().view(-1) if p.is_contiguous() else p.detach().reshape(-1)
            samples[name] = flat[places].to(torch.bfloat16)
    read = dict(zip(samples, fetched(list(samples.values())), strict=True))
    digest = hashlib.sha256()
    for name, p in parameters.items():
        digest.update(f"{name} {list(p.shape)}\n".encode())
        if name in read:
            digest.update(read[name].view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def own_parameters(model: nn.Module | Survey) -> dict[str, nn.Parameter]:
    """A model's parameters by name, without the compact values of attached weights."""
    return {name: p for p, name in Survey.of(model).first_names.items() if not is_compact(p)}
