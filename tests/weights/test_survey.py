"""What is found by looking at a model once."""

import pytest
import torch
from torch import nn

from fps_kernels.weights.survey import Survey
from tests.support.models import Classifier


class Tied(nn.Module):
    """An embedding that is also the output layer, and a block that stands twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.tokens.weight


def test_a_survey_is_made_once():
    model = Classifier()
    survey = Survey.of(model)
    assert Survey.of(survey) is survey
    assert survey.parameters == dict(model.named_parameters())
    assert list(survey.matrices) == ["position", "embed.weight", "hidden.weight", "out.weight", "head.weight"]
    assert survey.owner("hidden.weight") == (model.hidden, "weight")
    assert survey.owner("position") == (model, "position")
    assert survey.device == torch.device("cpu")


def test_shared_parameters_and_modules_have_a_first_name():
    survey = Survey.of(Tied())
    assert list(survey.first_names.values()) == ["tokens.weight", "block.weight", "block.bias"]
    assert survey.tied == {"again.weight": "block.weight", "again.bias": "block.bias", "out.weight": "tokens.weight"}
    assert list(survey.matrices) == ["tokens.weight", "block.weight"]


def test_names_are_those_that_a_model_gives():
    class Renamed(nn.Sequential):
        def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
            return ((f"of.{name}", p) for name, p in super().named_parameters(prefix, recurse, remove_duplicate))

    for model in (nn.Sequential(nn.Linear(2, 2), Tied()), Renamed(nn.Linear(2, 2)), Tied(), nn.Linear(2, 2)):
        survey = Survey.of(model)
        assert list(survey.parameters.items()) == list(model.named_parameters(remove_duplicate=False))
        assert list(survey.modules.items()) == list(model.named_modules(remove_duplicate=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_what_has_no_values_or_hides_its_work():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        Survey.of(nn.Sequential(nn.LazyLinear(3))).check_has_values()
    with torch.device("meta"):
        empty = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        Survey.of(empty).check_has_values()
    model = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.Linear(3, 3)))
    survey = Survey.of(model)
    assert survey.scripted == {"1.weight", "1.bias"}
    assert "TorchScript" in survey.reason_unused("1.weight", survey.parameters["1.weight"], {})
    never = "it was never used in the forward pass"
    assert survey.reason_unused("0.weight", survey.parameters["0.weight"], {}) == never
    elsewhere = survey.reason_unused("0.weight", survey.parameters["0.weight"], {"0.weight": "matmul()"})
    assert elsewhere == (
        "it reached matmul(), and was never the weight of F.linear, F.conv2d, torch.addmm, F.conv_transpose2d, "
        "torch.matmul or F.grouped_mm"
    )
