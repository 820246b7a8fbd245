"""The README's code runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest
import torch

import fps_kernels as fps
from tests.models import Classifier, labelled

README = Path(__file__).parent.parent / "README.md"
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


def test_commands_exist():
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (README.parent / "benchmarks" / f"{module}.py").is_file()
    for picture in re.findall(r"!\[[^\]]*\]\((?!http)([^)]+)\)", text):
        assert (README.parent / picture).is_file()


def test_there_are_three_uses():
    assert len(BLOCKS) == 3
