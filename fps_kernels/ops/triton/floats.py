"""Device functions on floating-point numbers, shared by the kernels.

bfloat16 is converted through its bits, both ways: a shift and an integer rounding are exact by construction on every
target, whereas Triton's interpreter truncates instead of rounding and mistreats subnormals.
"""

import triton
import triton.language as tl

# The 31 bits of every score are below this: the key of NaN, one above infinity's.
NAN_KEY = tl.constexpr(0x7F800001)


@triton.jit
def to_float32(x):
    """Any of the three dtypes as float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def bfloat16_bits(x):
    """float32 rounded to the nearest bfloat16, ties to even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry the payload of a NaN into the sign bit.
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def magnitude_bits(x):
    """``|x|`` as an int32 whose order is the order of the magnitudes, NaN above infinity."""
    return to_float32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def canonical_key(score):
    """The 31-bit key of a float32 score: its order is the order of ``|score|``, and every NaN has the same, highest key."""
    return tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN_KEY)


@triton.jit
def score_key(w, a):
    """:func:`canonical_key` of ``fl32(w * a)``: one rounded product, with nothing after it that could fuse."""
    return canonical_key(to_float32(w) * a)
