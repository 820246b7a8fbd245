"""``--config FILE.yaml``: any command's options from a file; what is given on the command line wins."""

import difflib
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fps_kernels.runs.hints import install_hint


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command, as if they had been written there.

    Raises:
        ValueError: a file that is no YAML mapping, an unknown key, or a value that no option can have.
        ImportError: PyYAML is missing.
    """
    if path is None:
        return None
    try:
        import yaml
    except ImportError as error:
        raise ImportError(install_hint("--config", error), name="yaml") from error
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise ValueError(f"{path} must map options to values, as in 'epochs: 10'")
    parameters = {name: p for p in context.command.params if (name := p.name) is not None and name not in ("config", "help")}
    spelled = {_spelling(p): name for name, p in parameters.items()}
    defaults: dict[str, Any] = {}
    for key, value in given.items():
        name = spelled.get(str(key).replace("_", "-"), "")
        if not name:
            near = difflib.get_close_matches(str(key).replace("_", "-"), spelled, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(spelled)}"
            raise ValueError(f"{path}: {context.info_name} has no option {key!r}: {hint}")
        repeated = bool(getattr(parameters[name], "multiple", False))
        if isinstance(value, list) and not repeated:
            raise ValueError(f"{path}: {key} takes one value, not a list")
        if isinstance(value, dict):
            raise ValueError(f"{path}: {key} takes a value, not a mapping")
        if value is not None:
            defaults[name] = [value] if repeated and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def as_config(context: typer.Context, given: Mapping[str, Any], leave_out: Collection[str] = ()) -> dict[str, Any]:
    """A command's arguments as a file for ``--config`` has them, so that the command can be given again.

    Args:
        context: of the command.
        given: its arguments by name.
        leave_out: names that are not to be in it; what is ``None`` is not, either.
    """
    found: dict[str, Any] = {}
    for parameter in context.command.params:
        value = given.get(parameter.name or "")
        if value is None or value == [] or parameter.name in ("config", "help", *leave_out):
            continue
        found[_spelling(parameter)] = str(value) if isinstance(value, Path | StrEnum) else value
    return found


def _spelling(parameter: Any) -> str:
    """How a parameter is written on the command line, without the dashes."""
    long = next((option for option in parameter.opts if option.startswith("--")), parameter.name)
    return str(long).lstrip("-").replace("_", "-")


Config = Annotated[
    Path | None,
    typer.Option(
        callback=_read,
        is_eager=True,  # before the options that it gives values to
        exists=True,
        dir_okay=False,
        metavar="FILE.yaml",
        help="Options from a YAML file, such as 'batch-size: 32'; those given here win.",
    ),
]
