"""The parameters that a selection names, and how an optimizer groups them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fps_kernels.selection import Selection
from fps_kernels.tuning.places import remember
from fps_kernels.weights.sharding import check_whole
from fps_kernels.weights.survey import Survey

Options = Callable[[str, nn.Parameter], Mapping[str, Any]]


def chosen_parameters(
    survey: Survey, selection: Selection | Mapping[str, Tensor]
) -> tuple[Selection, dict[str, nn.Parameter]]:
    """A selection, made of masks where it is none, and the parameters that it names.

    Raises:
        ValueError: names or shapes that are not the model's, none at all, or two names of one parameter.
        TypeError: masks that are not boolean tensors.
    """
    if not isinstance(selection, Selection):
        selection = Selection.from_masks(selection)
    parameters = selection.pick(survey.parameters)
    if not parameters:
        raise ValueError("the selection is empty: it names no parameter")
    names: dict[nn.Parameter, str] = {}
    for name, p in parameters.items():
        if (first := names.setdefault(p, name)) != name:
            raise ValueError(f"{first} and {name} are one parameter: name it once")
    return selection, parameters


def grouped(
    parameters: Iterable[tuple[str, nn.Parameter]], options: Options | None
) -> list[tuple[dict[str, Any], dict[str, nn.Parameter]]]:
    """Options, and the parameters that have them, by name; in the order in which options first appear."""
    groups: list[tuple[dict[str, Any], dict[str, nn.Parameter]]] = []
    for name, p in parameters:
        chosen = dict(options(name, p)) if options is not None else {}
        members = next((members for known, members in groups if known == chosen), None)
        if members is None:
            groups.append((chosen, members := {}))
        members[name] = p
    return groups


def masked_parameters(
    model: nn.Module,
    selection: Selection | Mapping[str, Tensor],
    *,
    options: Options | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`MaskedAdamW`: the chosen entries of the selected weights, and the dense parameters.

    The model is not changed: gradients are the usual dense ones, and no hook is installed. To save the memory and time
    of gradients that are not needed, freeze the other parameters yourself.

    Args:
        model: the model to tune.
        selection: a :class:`Selection`, or boolean masks in the shapes of their parameters, by name.
        options: ``options(name, parameter)`` gives the group options of a parameter, such as
            ``{"lr": 1e-4, "weight_decay": 0.0}``; parameters with equal options share a group.

    Returns:
        Param groups with the keys ``params``, ``names``, ``selections`` (one :class:`WeightSelection` or ``None`` per
        parameter) and the options.

    Raises:
        ValueError: names or shapes that are not the model's, two names of one parameter, or parameters that do not
            require gradients.
        TypeError: masks that are not boolean.

    Example:
        >>> groups = fps.masked_parameters(model, selection)
        >>> groups = fps.masked_parameters(model, {"fc.weight": model.fc.weight.abs() > 0.1})
        >>> optimizer = fps.MaskedAdamW(groups, lr=1e-3)
    """
    survey = Survey.of(model)
    check_whole(survey)
    selection, parameters = chosen_parameters(survey, selection)
    remember(model, parameters)
    for name, p in parameters.items():
        if not p.requires_grad:
            raise ValueError(f"{name} is selected but does not require gradients: call .requires_grad_() on it")
    return [
        {
            "params": list(members.values()),
            "names": list(members),
            "selections": [selection.weights.get(name) for name in members],
            **chosen,
        }
        for chosen, members in grouped(parameters.items(), options)
    ]
