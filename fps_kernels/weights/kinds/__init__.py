"""The kinds of weights. Each is one file and one line here; who chooses, trains or stores asks it, and knows none by name.

A kind's file has ``NAME``, for people; ``DIMENSIONS``, which the weights may have; ``SCORED``, whether an input multiplies
them, so that entries can be chosen by what they multiply; and ``FUNCTIONS``: those that take such weights, each with what
reads the arguments of a call and says what multiplies what, in one way, in several (either factor of a product may be the
weight), or in none that the kind serves.
"""

from collections.abc import Callable
from typing import Any

from fps_kernels.weights.kinds import (
    contraction,
    convolution,
    embedding,
    grouped,
    linear,
    transposed,
    transposed_convolution,
)
from fps_kernels.weights.kinds.kind import Call, WeightKind

KINDS = (linear, convolution, transposed, transposed_convolution, contraction, grouped, embedding)

Reader = Callable[..., Call | tuple[Call, ...] | None]
READERS: dict[Any, Reader] = {function: read for kind in KINDS for function, read in kind.FUNCTIONS.items()}
SCORED_FUNCTIONS = frozenset(function for kind in KINDS if kind.SCORED for function in kind.FUNCTIONS)
DIMENSIONS = frozenset(dimensions for kind in KINDS for dimensions in kind.DIMENSIONS)


def read_calls(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, ...]:
    """The ways to read a call of one of :data:`READERS` as a multiplication by a weight."""
    try:
        found = READERS[function](*args, **kwargs)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        return ()  # arguments that the reader does not know: a form of another version, or a wrong one, which torch refuses
    return () if found is None else (found,) if isinstance(found, Call) else found


__all__ = ["DIMENSIONS", "KINDS", "READERS", "SCORED_FUNCTIONS", "Call", "WeightKind", "read_calls"]
