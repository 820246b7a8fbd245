"""Weights from files as people have them."""

import argparse
import collections
import pathlib

import pytest
import timm
import torch
from safetensors.torch import save_file

from fps_kernels.runs.checkpoints import read_checkpoint
from fps_kernels.runs.models import timm_model


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("teacher", "state_dict")])
def test_wrappers_and_prefixes(state, tmp_path, capsys, prefix, keys):
    content = collections.OrderedDict((prefix + name, t) for name, t in state.items())
    if "backbone" in prefix:
        content["module.head.mlp.weight"] = torch.ones(2, 2)
    for key in reversed(keys):
        content = {"epoch": 3, "optimizer": {"state": {}}, key: content}
    torch.save(content, tmp_path / "a.pth")
    assert same(read_checkpoint(tmp_path / "a.pth", frozenset(state)), state)
    said = capsys.readouterr().err
    assert (f"weights are those under {' / '.join(keys)}" in said) == bool(keys)
    assert (f"took {prefix} off the names" in said) == bool(prefix)
    model = timm_model("test_vit", tmp_path / "a.pth", 7, None)
    assert torch.equal(model.get_parameter("blocks.0.attn.qkv.weight"), state["blocks.0.attn.qkv.weight"])


def test_prefixes_of_safetensors(state, tmp_path):
    save_file({f"encoder.{name}": t for name, t in state.items()}, tmp_path / "a.safetensors")
    assert same(read_checkpoint(tmp_path / "a.safetensors", frozenset(state)), state)
    assert all(name.startswith("encoder.") for name in read_checkpoint(tmp_path / "a.safetensors"))


def test_names_that_the_model_has_with_a_prefix_keep_it(tmp_path):
    tensors = {"model.weight": torch.ones(1), "model.bias": torch.ones(1)}
    torch.save(tensors, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt", frozenset(tensors)), tensors)


def test_what_would_run_code_is_not_read(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").keys() == {"a"}  # values only
    torch.save({"model": {"a": torch.ones(1)}, "where": pathlib.Path("b")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds more than tensors, and reading it would run code: load it where"):
        read_checkpoint(tmp_path / "a.pth")


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a\.pth is no checkpoint of torch, or damaged: "):
        read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a\.safetensors: no safetensors file, or damaged"):
        read_checkpoint(tmp_path / "a.safetensors")
    torch.save({"model": {"epoch": 3}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth holds no weights by name under model: it has epoch"):
        read_checkpoint(tmp_path / "b.pth")
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"no safetensors file, or damaged: .* \(files of torch end with \.pth"):
        read_checkpoint(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"there is no file or folder .*/c\.pth"):
        read_checkpoint(tmp_path / "c.pth")
