"""Which weights of a model there is to choose from, and which parameters are trained whole."""

from torch import nn

from fps_kernels.choosing.statistics import ActivationStats
from fps_kernels.weights.matrix import MatrixLayout, unfit
from fps_kernels.weights.roles import Patterns, as_patterns, default_dense, matching
from fps_kernels.weights.survey import Survey


def eligible_weights(
    survey: Survey, include: Patterns | None, exclude: Patterns | None, dense: Patterns | None
) -> tuple[dict[str, nn.Parameter], tuple[str, ...], dict[str, str]]:
    """Split a model's parameters: weights to choose from, names to train whole, and reasons for the rest.

    Raises:
        ValueError: a pattern that matches nothing.
        TypeError: an ``include`` of weights that are not floating-point.
    """
    every = {name: p for p, name in survey.first_names.items()}
    matrices = survey.matrices
    wanted = as_patterns(include, "include")
    included = set(matching(wanted, matrices, "include", "matrix weights")) if include is not None else set(matrices)
    excluded = set(matching(as_patterns(exclude, "exclude"), every, "exclude", "parameters"))
    if dense is None:
        # A weight that include names in full is chosen from, even if the protocol would train it whole.
        whole = tuple(n for n in default_dense(survey) if n not in excluded and n not in wanted)
    else:
        whole = tuple(matching(as_patterns(dense, "dense"), every, "dense", "parameters"))
        if clash := [n for n in whole if n in excluded]:
            raise ValueError(f"{clash[0]} matches both dense and exclude")
    sharded = survey.sharded
    for name in whole:
        if reason := unfit(every[name] if name not in sharded else sharded[name].local):
            raise TypeError(f"{name} cannot be trained whole: {reason}")
    eligible, skipped = {}, {}
    for name, p in matrices.items():
        if name in whole:
            skipped[name] = "trained whole"
        elif name in excluded:
            skipped[name] = "excluded"
        elif name not in included:
            skipped[name] = "not included"
        elif sharded and name not in sharded:
            skipped[name] = "it is not sharded, while others are: no one would add up its gradients"
        elif reason := unfit(p if name not in sharded else sharded[name].local):
            if include is not None:
                raise TypeError(f"{name} cannot be tuned: {reason}")
            skipped[name] = reason
        elif p.numel() == 0:
            skipped[name] = "it has no entries"
        else:
            eligible[name] = p
    return eligible, whole, skipped


def usable_layouts(
    eligible: dict[str, nn.Parameter], stats: ActivationStats
) -> tuple[dict[str, MatrixLayout], dict[str, str]]:
    """Layouts of the eligible weights that have statistics, and why the others have none.

    Raises:
        ValueError: statistics of another model.
    """
    layouts, unusable = {}, {}
    for name, p in eligible.items():
        if name in stats:
            layout = stats[name].layout
            if layout.parameter_shape != tuple(p.shape):
                raise ValueError(
                    f"stats are of another model: {name} has shape {list(p.shape)} here, "
                    f"{list(layout.parameter_shape)} in the statistics"
                )
            layouts[name] = layout
        elif name in stats.unused:
            unusable[name] = stats.unused[name]
        else:
            raise ValueError(f"stats are of another model: they do not mention {name}")
    return layouts, unusable
