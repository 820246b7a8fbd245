"""PEFT: adapters that the real library loads, and its own adapters as deltas."""

import copy
import json

import peft
import pytest
import timm
import torch
from torch import nn

import fps_kernels as fps
from fps_kernels.deltas.making import delta_of
from fps_kernels.integrations.peft import read_adapter, shira_mask, write_shira, write_supertuning

TARGETS = ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1"]
INCLUDE = [f"{name}.weight" for name in TARGETS]


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=48, num_heads=3).eval()


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32)


def tuned(model: nn.Module, budget) -> fps.Tuner:
    """A tuner of a copy that was trained a little."""
    twin = copy.deepcopy(model)
    selection = fps.select(twin, [images()], budget=budget, include=INCLUDE, dense="head.*")
    tuner = fps.attach(twin, selection)
    optimizer = fps.MaskedAdamW(tuner, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        twin(images()).square().sum().backward()
        optimizer.step()
    return tuner


WRITERS = {
    "SHiRA": (write_shira, fps.LikeLoRA(2)),
    "SHiRA, filled up": (write_shira, fps.PerNeuron(3)),
    "Super-Tuning": (write_supertuning, fps.PerTensor(0.03)),
    "Super-Tuning, filled up": (write_supertuning, fps.PerNeuron(3)),
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_what_was_tuned_is_loaded_by_peft(tmp_path, kind):
    write, budget = WRITERS[kind]
    base, x = vit(), images()
    tuner = tuned(base, budget)
    write(tmp_path, delta_of(tuner), base)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(x), tuner.model(x), rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    for name, p in tuner.model.named_parameters():
        if name in tuner.compact or name in tuner.dense:
            torch.testing.assert_close(merged.get_parameter(name), p, check_dtype=False, rtol=1e-6, atol=1e-6)

    again = read_adapter(tmp_path, base)
    for name, w in tuner.selection.items():
        assert not (w.mask() & ~again.selection[name].mask()).any()
        if "filled" not in kind:
            assert torch.equal(w.columns, again.selection[name].columns)
    again.apply_(base)
    torch.testing.assert_close(base(x), tuner.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["SHiRA", "Super-Tuning"])
def test_a_selection_is_an_adapter_that_changes_nothing_yet_and_trains_there(tmp_path, kind):
    write, budget = WRITERS[kind]
    base, x = vit(), images()
    selection = fps.select(base, [x], budget=budget, include=INCLUDE, dense="head.*")
    write(tmp_path, selection, base)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded(x), base(x))
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    merged = loaded.merge_and_unload()
    masks = selection.masks()
    for name in INCLUDE:
        moved = merged.get_parameter(name) != base.get_parameter(name)
        assert moved[masks[name]].any()
        assert not moved[~masks[name]].any()


@pytest.mark.parametrize(
    "config",
    [
        peft.ShiraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"], init_weights=False),
        peft.SupertuningConfig(sparsity=0.97, target_modules=TARGETS, modules_to_save=["head"], init_weights=False),
    ],
    ids=["SHiRA", "Super-Tuning"],
)
def test_adapters_of_peft_become_deltas(tmp_path, config):
    base, x = vit(), images()
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    wrapped.save_pretrained(tmp_path)
    delta = read_adapter(tmp_path, base)
    assert set(delta.selection) == set(INCLUDE)
    assert set(delta.dense) == {"head.weight", "head.bias"}
    delta.apply_(base)
    torch.testing.assert_close(base(x), wrapped(x), rtol=1e-4, atol=1e-5)


def test_a_mask_function_with_the_best_scores_and_the_exact_budget():
    model, data = vit(), [images()]
    expected = fps.select(model, data, budget=fps.LikeLoRA(2), include=INCLUDE, dense="head.*").masks()
    config = peft.ShiraConfig(r=2, target_modules=TARGETS, mask_type="fps")
    config.mask_fn = shira_mask(model, data)
    wrapped = peft.get_peft_model(model, config)
    for name in TARGETS:
        layer = wrapped.base_model.model.get_submodule(name)
        mask = torch.zeros(layer.base_layer.weight.shape, dtype=torch.bool)
        mask[tuple(layer.shira_indices["default"].long())] = True
        assert torch.equal(mask, expected[f"{name}.weight"])
        assert layer.shira_weight["default"].numel() == 2 * (layer.in_features + layer.out_features)
    wrapped(images()).sum().backward()


def test_a_mask_function_refuses_what_it_cannot_choose_from():
    model, data = vit(), [images()]
    mask = shira_mask(model, stats=fps.calibrate(model, data), scorer=fps.FPS())
    with pytest.raises(ValueError, match="is no layer of the model"):
        mask(nn.Linear(3, 3), 1)
    with pytest.raises(ValueError, match="SHiRA of rank 40 needs 7680 entries of blocks.0.attn.qkv.weight, which has 6912"):
        mask(model.blocks[0].attn.qkv, 40)
    with pytest.raises(ValueError, match="either data or stats"):
        shira_mask(model)


def test_what_adapters_cannot_hold_is_refused(tmp_path):
    model, data = vit(), [images()]
    sized = {"budget": fps.LikeLoRA(1)}
    with pytest.raises(ValueError, match="patch_embed.proj.weight belongs to a Conv2d"):
        write_shira(tmp_path / "a", fps.select(model, data, include="patch_embed*", dense="head.*", **sized), model)
    with pytest.raises(ValueError, match="trained whole and its module was not"):
        write_shira(tmp_path / "a", fps.select(model, data, include=INCLUDE, **sized), model)
    chosen = fps.select(model, data, include=INCLUDE, dense="head.*", budget=fps.LikeLoRA(2))
    with pytest.raises(ValueError, match="rank=1 has places for 192 entries of blocks.0.attn.qkv.weight, which has 384"):
        write_shira(tmp_path / "a", chosen, model, rank=1)
    with pytest.raises(ValueError, match="density=0.01 has places for"):
        write_supertuning(tmp_path / "a", chosen, model, density=0.01)
    with pytest.raises(ValueError, match="the delta is of another base model"):
        write_shira(tmp_path / "a", delta_of(tuned(model, fps.LikeLoRA(1))), vit())
    with pytest.raises(ValueError, match="the selection names no weight"):
        write_shira(tmp_path / "a", fps.Selection({}), model)
    delta = delta_of(tuned(model, fps.LikeLoRA(1)))
    delta.buffers["norm.running_mean"] = torch.zeros(3)
    for write in (write_shira, write_supertuning):
        with pytest.raises(ValueError, match=r"holds buffers that training changed \(norm.running_mean\).*buffers.clear"):
            write(tmp_path / "a", delta, model)
    assert not (tmp_path / "a").exists()
    delta.buffers_left_out = (*delta.buffers,)
    delta.buffers.clear()
    with pytest.warns(UserWarning, match="does not hold, nor does the adapter") as seen:
        write_shira(tmp_path / "a", delta, model)
    assert seen[0].filename == __file__


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = vit()
    chosen = fps.select(model, [images()], include=INCLUDE, dense="head.*", budget=fps.LikeLoRA(2))
    write_shira(tmp_path, chosen, model)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=24, num_heads=3)
    with pytest.raises(ValueError, match="the adapter is of another model"):
        read_adapter(tmp_path, other)
    with pytest.raises(ValueError, match="the adapter is of another model: this one has no matrix"):
        read_adapter(tmp_path, nn.Linear(2, 2))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds a LORA adapter"):
        read_adapter(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "SUPERTUNING", "r": 4}))
    with pytest.raises(ValueError, match="low-rank part"):
        read_adapter(tmp_path, model)
