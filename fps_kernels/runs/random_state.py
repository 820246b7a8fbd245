"""The state of every generator of random numbers that a model may draw from."""

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of all of them, as what JSON can hold and as tensors."""
    kind, keys, *rest = np.random.get_state()
    assert not isinstance(keys, int | str)
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    content = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    return content, tensors


def restore_random_state(content: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """What :func:`random_state` found; a GPU's only where the run was on one."""
    version, numbers, following = content["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, *rest = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def packed(content: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """What :func:`random_state` found, as bytes ``[n]``: what processes tell each other."""
    found = {"content": content, "tensors": {name: t.cpu().tolist() for name, t in tensors.items()}}
    return torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)


def unpacked(state: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reverse."""
    found = json.loads(state.numpy().tobytes())
    return found["content"], {name: torch.tensor(t, dtype=torch.uint8) for name, t in found["tensors"].items()}
