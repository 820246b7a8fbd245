"""What a results file holds survives being written and read."""

import torch

from benchmarks.accuracy.lines import from_bits, to_bits


def test_bits():
    right = torch.rand(13, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(from_bits(to_bits(right), 13), right)
    assert to_bits(torch.tensor([True, False, False, False, True])) == "88"
    assert from_bits("0f", 8).tolist() == [False] * 4 + [True] * 4
