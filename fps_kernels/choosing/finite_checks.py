"""What must be finite, looked at when everything is done: one wait for the device, whatever the number of weights."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from fps_kernels.ops.transfers import fetched


class FiniteCheck(NamedTuple):
    """A number that is finite unless something is wrong.

    Attributes:
        number: one number of any float dtype, on any device, not read yet.
        refuse: raises what is to be raised where it is not finite.
    """

    number: Tensor
    refuse: Callable[[], None]


def check_finite(checks: Sequence[FiniteCheck]) -> None:
    """Read all numbers, with one copy from each device, and refuse the first that is not finite.

    Raises:
        ValueError: as the check whose number it is.
    """
    for check, number in zip(checks, fetched([check.number for check in checks]), strict=True):
        if not math.isfinite(number.item()):
            check.refuse()
