"""Telling base models apart."""

import hashlib
import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from fps_kernels.ops.transfers import fetched
from fps_kernels.weights.matrix import computes_its_numbers, is_simulated
from fps_kernels.weights.shards import Shard
from fps_kernels.weights.survey import Survey, is_compact

_SAMPLED = 512  # entries of each parameter that are looked at


def fingerprint(model: nn.Module | Survey, without: Collection[str] = ()) -> str:
    """What identifies a base model: names and shapes of its parameters, and a sample of their values as bfloat16.

    At most 512 entries of each parameter are looked at, evenly spaced. A model that differs in no more than a few entries
    may have the same fingerprint; two trained models never do. In float32 and bfloat16 a model has the same one. Of
    quantised parameters only names and shapes count. A sharded model has the same one as a whole one: all of its processes
    have to ask together.

    Args:
        model: any module.
        without: names of parameters that do not count, such as those of a new head.
    """
    survey = Survey.of(model)
    parameters, sharded = own_parameters(survey), survey.sharded
    parameters = {name: p for name, p in parameters.items() if name not in without}
    samples = {}
    for name, p in parameters.items():
        if name in sharded:
            continue
        if p.is_floating_point() and p.numel() and not p.is_meta and not is_simulated(p) and not computes_its_numbers(p):
            n = min(_SAMPLED, p.numel())
            places = torch.arange(n, device=p.device) * p.numel() // n
            flat = p.detach().view(-1) if p.is_contiguous() else p.detach().reshape(-1)
            samples[name] = flat[places].to(torch.bfloat16)
    read = dict(zip(samples, fetched(list(samples.values())), strict=True))
    read |= _of_all_processes({name: sharded[name] for name in parameters if name in sharded})
    digest = hashlib.sha256()
    for name, p in parameters.items():
        digest.update(f"{name} {list(p.shape)}\n".encode())
        if name in read:
            digest.update(read[name].view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _of_all_processes(shards: dict[str, Shard]) -> dict[str, Tensor]:
    """The samples of sharded parameters, put together in one exchange."""
    parts = []
    for shard in shards.values():
        p, local = shard.parameter, shard.local
        n = min(_SAMPLED, p.numel())
        places = torch.arange(n, device="cpu") * p.numel() // max(n, 1)
        step = math.prod(p.shape[shard.dim + 1 :])
        first, last = shard.bounds[shard.rank]
        row = places // step % p.shape[shard.dim] if n else places
        inside = (row >= first) & (row < last)
        outer, rest = places // (step * max(p.shape[shard.dim], 1)), places % max(step, 1)
        here = (outer * (last - first) + row - first) * step + rest
        bits = torch.zeros(n, dtype=torch.int32, device="cpu")
        if bool(inside.any()) and p.is_floating_point():
            numbers = local.reshape(-1)[here[inside].to(local.device)].to(torch.bfloat16).cpu()
            bits[inside] = numbers.view(torch.int16).int()
        parts.append(bits)
    if not parts:
        return {}
    some = next(iter(shards.values()))
    every = torch.cat(parts).to(some.device)
    torch.distributed.all_reduce(every, group=some.group)  # every other process has zeros there
    split = every.cpu().to(torch.int16).view(torch.bfloat16).split([part.numel() for part in parts])
    return {name: part for (name, shard), part in zip(shards.items(), split, strict=True) if shard.parameter.numel()}


def own_parameters(model: nn.Module | Survey) -> dict[str, nn.Parameter]:
    """A model's parameters by name, without the compact values of attached weights."""
    return {name: p for p, name in Survey.of(model).first_names.items() if not is_compact(p)}
