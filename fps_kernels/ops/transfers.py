"""Numbers on their way to a device and back: nobody waits for what goes there, and once for all that comes back.

A host that waits for a GPU has nothing queued there when it goes on. So numbers go up from pinned memory, behind the work
that is queued, and what the host must know of many tensors it reads with one copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_ON_HOST: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # what tensors hold, on the CPU


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)``, without waiting where it goes to a GPU. It must not be changed afterwards.

    Args:
        tensor: of any shape, on any device.
        device: where it goes. What comes to the CPU is there on return; :func:`fetched` brings many.
        dtype: what it becomes; its own if ``None``.
    """
    device = torch.device(device)
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type == "cuda")


def uploaded(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)``, without waiting for the device.

    Example:
        >>> rates = uploaded([1e-3, 1e-4], torch.float64, weight.device)
    """
    made = torch.tensor(values, dtype=dtype, device="cpu")
    # torch gives pinned memory to nobody else before the copy from there is done.
    return sent(made.pin_memory(), device) if device.type == "cuda" else made.to(device)


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, with one copy, and one wait, for each device that some are on.

    Args:
        tensors: of any shapes and dtypes. Those on the CPU are given back as they are.

    Example:
        >>> greater, equal = fetched([greater, equal])
    """
    found = list(tensors)
    away: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(found):
        if tensor.device.type != "cpu":
            away.setdefault(tensor.device, []).append(i)
    for places in away.values():
        # The widest first: then each begins where numbers of its width may.
        places.sort(key=lambda i: -found[i].element_size())
        as_bytes = [found[i].detach().contiguous().view(-1).view(torch.uint8) for i in places]
        together = (as_bytes[0] if len(as_bytes) == 1 else torch.cat(as_bytes)).cpu()
        for i, part in zip(places, together.split([p.numel() for p in as_bytes]), strict=True):
            found[i] = part.view(found[i].dtype).view(found[i].shape)
    return found


def note_on_host(tensor: Tensor, numbers: Tensor) -> None:
    """Note that the host has what a tensor holds, which is not changed as long as it lives."""
    _ON_HOST[tensor] = numbers


def on_host(tensor: Tensor) -> Tensor:
    """What a tensor holds, on the CPU: without a wait if :func:`note_on_host` was told."""
    known: Tensor | None = _ON_HOST.get(tensor)
    return tensor.cpu() if known is None else known
