"""Whole numbers in as many bits as they need."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fps_kernels.storage.bits import bits_for, pack, packed_size, unpack


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(0, 3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing(numbers, more):
    bits = min(31, bits_for(max(numbers, default=0)) + more)
    packed = pack(torch.tensor(numbers, dtype=torch.int64), bits)
    assert packed.numel() == packed_size(len(numbers), bits)
    assert unpack(packed, len(numbers), bits).tolist() == numbers


def test_packing_of_many():
    numbers = torch.randint(2**11, (2**20 + 13,))
    assert torch.equal(unpack(pack(numbers, 11), len(numbers), 11).long(), numbers)
    with pytest.raises(ValueError, match="hold no"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 8)
