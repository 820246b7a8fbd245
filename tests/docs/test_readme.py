"""The README's code runs as it stands, and its commands exist."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import fps_kernels as fps
from tests.support.models import Classifier, labelled

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code(index):
    assert len(BLOCKS[index].strip().splitlines()) <= 10
    model = Classifier()
    before = model.hidden.weight.detach().clone()
    scope = {"fps": fps, "torch": torch, "model": model, "loader": [labelled(), labelled()]}
    scope |= {"x": torch.randn(5, 12), "W": torch.randn(9, 12)}
    exec(BLOCKS[index], scope)
    if "selection" in scope:
        assert torch.equal(model.hidden.weight == before, ~scope["selection"]["hidden.weight"].mask())


def commands_in(text: str) -> list[list[str]]:
    """Every call of ``fps-kernels`` in a text's code, split into words."""
    code = re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("fps-kernels ")]


@cache
def options_of(subcommand: str) -> str:
    """What ``fps-kernels SUBCOMMAND --help`` says, or nothing where there is no such command."""
    program = Path(sys.executable).with_name("fps-kernels")
    said = subprocess.run(
        [program, subcommand, "--help"], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    return said.stdout if said.returncode == 0 else ""


def unknown_options(command: list[str]) -> list[str]:
    """The words of a command that the command line does not know: the subcommand, or its options."""
    if not (known := options_of(command[1])):
        return [command[1]]
    return [word for word in command[2:] if word.startswith("-") and not re.search(rf"(?<![\w-]){word}(?![\w-])", known)]


def test_commands_exist():
    text = README.read_text()
    for command in commands_in(text):
        assert not unknown_options(command), command
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m benchmarks\.(\w+)", text):
        script = README.parent / "benchmarks" / module
        assert script.with_suffix(".py").is_file() or (script / "__main__.py").is_file(), module
    for picture in re.findall(r"!\[[^\]]*\]\((?!http)([^)]+)\)", text):
        assert (README.parent / picture).is_file()


def test_there_are_three_uses():
    assert len(BLOCKS) == 3
