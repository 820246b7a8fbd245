"""Digits of keys: how the k-th largest of many is found by counting, in a few passes."""

import triton
import triton.language as tl

# Since Triton 3.8 `tl.histogram` is one shared-memory atomic per entry, however many bins there are: three digits, few
# passes. Before, each warp counted all bins in its registers, a thread `bins / 32` of them for every entry: four digits.
_IN_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
KEY_BITS = 31
FIRST_BITS, NEXT_BITS = (7, 8) if _IN_REGISTERS else (11, 10)
NEXT_DIGITS = (KEY_BITS - FIRST_BITS) // NEXT_BITS
BITS = (FIRST_BITS, *(NEXT_BITS,) * NEXT_DIGITS)
SHIFTS = tuple(sum(BITS[number + 1 :]) for number in range(len(BITS)))


@triton.jit
def occurrences(digit, counted, BINS: tl.constexpr):
    """How often each digit occurs ``[BINS]`` among those of ``[R, C]`` that are counted.

    Digits and mask go through one reshape. Triton lets a reshape whose result is only reduced put the elements into any
    order (its pass ``CombineReshapeReducePatterns`` adds ``allow_reorder``), and it chooses that order for each reshape
    alone: a mask with a reshape of its own may come to mask other digits than its own.
    """
    flat = tl.ravel(tl.where(counted, digit, -1))
    return tl.histogram(tl.maximum(flat, 0), BINS, mask=flat >= 0)


@triton.jit
def digit_of_rank(counts, rank, BINS: tl.constexpr):
    """The digit of the key that is the ``rank``-th largest among counted ones, and its rank among those of that digit."""
    bins = tl.arange(0, BINS)
    reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys of this digit and above it
    digit = tl.sum((reached >= rank).to(tl.int32), 0) - 1
    return digit, rank - tl.sum(tl.where(bins > digit, counts, 0), 0)
