"""Models that stay in their files: the choice is that of a model in memory, and every error is said before anything runs."""

import json
import sys

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

import fps_kernels as fps
from fps_kernels.weights.streaming import INDEX, streamed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.table = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.position * self.scale
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(1)))


TOKENS = torch.arange(24).view(4, 6) % 20


@pytest.fixture
def whole() -> Model:
    torch.manual_seed(0)
    model = Model()
    model.norm.running_mean.add_(0.3)
    return model


def empty() -> Model:
    with init_empty_weights():
        model = Model()
    model.head.weight = model.table.weight
    return model


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    del state["head.weight"]  # tied: it is there once
    return state


@pytest.fixture(params=["a file", "a folder", "an index", "a folder with an index"])
def checkpoint(request, tmp_path, whole):
    state = saved(whole)
    if "index" not in request.param:
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors" if request.param == "a file" else tmp_path
    names = list(state)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: state[name] for name in mine}, tmp_path / file)
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path / INDEX if request.param == "an index" else tmp_path


@pytest.mark.parametrize("budget", [fps.PerNeuron(2), fps.PerTensor(0.1)], ids=repr)
def test_the_same_choice_as_in_memory(whole, checkpoint, budget):
    model = empty()
    found = fps.select(model, [TOKENS], budget=budget, checkpoint=checkpoint, progress=False)
    expected = fps.select(whole, [TOKENS], budget=budget, progress=False)
    assert list(found) == list(expected)
    for name, entries in expected.items():
        assert torch.equal(found[name].columns, entries.columns), name
        assert torch.equal(found[name].row_offsets, entries.row_offsets), name
    assert found.dense == expected.dense
    assert all(p.is_meta for p in model.parameters())
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    fps.attach(whole, found)


def test_the_output_is_that_of_the_whole_model(whole, checkpoint):
    model = empty().eval()
    with torch.no_grad(), streamed(model, checkpoint):
        assert torch.equal(model(TOKENS), whole.eval()(TOKENS))


def test_what_does_not_fit_is_said_before_anything_runs(tmp_path, whole):
    path = tmp_path / "model.safetensors"

    def refused(state: dict[str, torch.Tensor], message: str, model: nn.Module | None = None) -> None:
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            fps.select(empty() if model is None else model, [TOKENS], checkpoint=path, progress=False)

    state = saved(whole)
    refused({k: v for k, v in state.items() if k != "position"}, "the checkpoint has no position")
    refused({**state, "position": torch.zeros(1, 5, 8)}, r"position has shape \[1, 6, 8\] in the model and \[1, 5, 8\] in")
    refused(state, "position has values already: build the model with accelerate.init_empty_weights", Model())
    with torch.device("meta"):
        model = Model()
    refused(state, "the checkpoint has no scale, nor should it: .* which gives buffers values", model)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is no safetensors file"):
        fps.select(empty(), [TOKENS], checkpoint=path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fps.select(empty(), [TOKENS], checkpoint=tmp_path / "other.safetensors")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        fps.select(empty(), [TOKENS], checkpoint=tmp_path / "index.json")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 .safetensors files and no model.safetensors.index.json"):
        fps.select(empty(), [TOKENS], checkpoint=tmp_path)
    with pytest.raises(TypeError, match="checkpoint needs the model itself"):
        from fps_kernels.weights.survey import Survey

        fps.select(Survey.of(empty()), [TOKENS], checkpoint=path)


def test_without_accelerate(monkeypatch, tmp_path, whole):
    save_file(saved(whole), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        fps.select(empty(), [TOKENS], checkpoint=tmp_path)
