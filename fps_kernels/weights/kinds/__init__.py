"""The kinds of weights. Each is one file and one line here; who chooses, trains or stores asks it, and knows none by name.

A kind's file has ``NAME``, for people; ``FUNCTIONS``, which take such weights; ``DIMENSIONS``, which the weights may have;
``SCORED``, whether an input multiplies them, so that entries can be chosen by what they multiply; and ``read``, which takes
the arguments of such a call and says what multiplies what, or ``None`` where it is none that the kind serves.
"""

from collections.abc import Callable
from typing import Any

from fps_kernels.weights.kinds import convolution, embedding, linear, transposed
from fps_kernels.weights.kinds.kind import Call, WeightKind

KINDS = (linear, convolution, transposed, embedding)

Reader = Callable[..., Call | None]
READERS: dict[Any, Reader] = {function: kind.read for kind in KINDS for function in kind.FUNCTIONS}
SCORING_READERS: dict[Any, Reader] = {f: kind.read for kind in KINDS if kind.SCORED for f in kind.FUNCTIONS}
DIMENSIONS = frozenset(dimensions for kind in KINDS for dimensions in kind.DIMENSIONS)

__all__ = ["DIMENSIONS", "KINDS", "READERS", "SCORING_READERS", "Call", "WeightKind"]
