"""Whole numbers in as many bits as they need."""

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # numbers that are taken apart together: bounds the scratch


def bits_for(largest: int) -> int:
    """Bits that hold every number from 0 to ``largest``; at least one."""
    return max(1, int(largest).bit_length())


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers take."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Non-negative numbers below ``2**bits`` one after the other, most significant bit first, as uint8.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 2)
        tensor([108], dtype=torch.uint8)
    """
    parts = []
    place = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    values = numbers.cpu().numpy().astype(np.uint32)
    for start in range(0, len(values), _CHUNK):  # a multiple of 8, so that every part but the last fills whole bytes
        taken = (values[start : start + _CHUNK, None] >> place) & 1
        parts.append(np.packbits(taken.astype(np.uint8).ravel()))
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.uint8))


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first ``count`` numbers of :func:`pack`, int32.

    Raises:
        ValueError: there are fewer.
    """
    if packed.numel() < packed_size(count, bits):
        raise ValueError(f"{packed.numel()} bytes hold no {count} numbers of {bits} bits")
    data = packed.numpy()
    weight = (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)).astype(np.int64)
    found = np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        begin = start * bits // 8
        taken = np.unpackbits(data[begin : begin + packed_size(n, bits)], count=n * bits)
        found[start : start + n] = taken.reshape(n, bits) @ weight
    return torch.from_numpy(found)
