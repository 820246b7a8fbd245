"""The parameters that a selection names, and how an optimizer groups them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fps_kernels.selection import Selection
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
