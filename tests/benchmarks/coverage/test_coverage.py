"""What is done with each model, and what is said of it."""

import json

import pytest
import torch
from torch import nn

from benchmarks.coverage import command
from benchmarks.coverage.checks import Outcome, Sample, examine, loss_of
from benchmarks.coverage.names import names
from benchmarks.coverage.zoo import families
from benchmarks.render import coverage as rendered


class Model(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.fc, self.out = nn.Linear(8, 12), nn.Linear(12, 4)
        self.wrong = wrong

    def forward(self, tokens: torch.Tensor, noise: torch.Tensor) -> dict[str, object]:
        x = self.fc(self.table(tokens) + (torch.randn_like(noise) if self.wrong else noise)).tanh()
        return {"hidden": (x, [x * 2]), "out": self.out(x), "count": 3}


def sample(wrong: bool = False) -> Sample:
    return Sample(Model(wrong), {"tokens": torch.randint(10, (2, 5)), "noise": torch.randn(2, 5, 8)})


def test_all_that_is_checked():
    outcome = examine("ours", "small", sample)
    assert not outcome.error
    assert outcome.checks == dict.fromkeys(
        ("gradients", "no dense gradient", "frozen bits", "moved", "applied", "reverted"), True
    )
    assert outcome.entries == 80 + 96 + 48
    assert outcome.eligible == pytest.approx(144 / 224)
    ((reason, share),) = outcome.skipped.items()
    assert reason.startswith("it reached embedding()")
    assert share == pytest.approx(80 / 224)


def test_what_does_not_hold_is_named():
    """A model whose forward pass is another one each time has other gradients."""
    outcome = examine("ours", "noisy", lambda: sample(wrong=True))
    assert not outcome.checks["gradients"]
    assert "gradients" in command.line(outcome)
    broken = examine("ours", "broken", lambda: Sample(nn.Linear(3, 4), torch.randn(2, 5)))
    assert broken.error.startswith("RuntimeError: mat1 and mat2")
    assert broken.error in command.line(broken)


def test_a_loss_of_all_of_an_output():
    x = torch.randn(6, requires_grad=True)
    loss = loss_of({"a": x * 2, "b": [x.sin(), (x.long(), None)]})
    (g,) = torch.autograd.grad(loss, x)
    assert (g != 0).all()


def test_names_are_of_one_model_each():
    every = {family: list(zoo) for family, zoo in families().items()}
    assert sum(map(len, every.values())) > 200
    assert len(set(names("timm"))) == len(names("timm")) == len(every["timm"])
    assert not set(names("transformers, texts")) & set(names("transformers, images"))


def test_the_command_keeps_what_it_knows_of_others(tmp_path, monkeypatch, capsys):
    from benchmarks.shared import measuring

    for module in (command, measuring):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "families", lambda: {"ours": {"a": sample, "b": sample}})
    command.main(["--match", "a"])
    command.main(["--family", "ours", "--match", "b", "--keep"])
    assert [row["model"] for row in json.loads((tmp_path / "coverage.json").read_text())["rows"]] == ["a"]
    command.main(["--match", "b"])
    content = json.loads((tmp_path / "coverage.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["a", "b"]
    assert "all" in capsys.readouterr().out
    assert "| ours | 2 | 2 | 0 | 64.3% |" in rendered.by_library(content)
    assert "`a` | 0.00 | 64.3% | all |" in rendered.by_model(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "falcon"])
def test_mixtures_of_experts_and_products(kind):
    outcome = examine("transformers", kind, families()["transformers"][kind])
    assert not outcome.error
    assert all(outcome.checks.values())
    assert outcome.eligible > 0.95


def test_a_row_has_what_an_outcome_has():
    assert Outcome("a", "b").row()["family"] == "a"
