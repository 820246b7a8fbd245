"""Selection on real architectures, randomly initialised: every matrix weight is chosen from, or listed with a reason."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import fps_kernels as fps

IMAGES = {
    "vit": "vit_tiny_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "beit": "beit_base_patch16_224",
    "eva02": "eva02_tiny_patch14_224",
    "swin": "swin_tiny_patch4_window7_224",
    "swinv2": "swinv2_tiny_window8_256",
    "convnext": "convnext_atto",
    "dinov2": "vit_small_patch14_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
    "mixer": "mixer_s32_224",
    "maxvit": "maxvit_rmlp_pico_rw_256",
    "cait": "cait_xxs24_224",
    "xcit": "xcit_nano_12_p16_224",
    "davit": "davit_tiny",
    "siglip": "vit_base_patch16_siglip_224",
    "hiera": "hiera_tiny_224",
    "efficientvit": "efficientvit_b0",
    "efficientvit (msra)": "efficientvit_m0",
    "mobilevit": "mobilevit_xxs",
    "naflexvit": "naflexvit_base_patch16_gap",
}
SHALLOW = {"depth": 2}
KEYWORDS = {
    "vit": SHALLOW,
    "deit3": SHALLOW,
    "beit": SHALLOW,
    "eva02": SHALLOW,
    "dinov2": SHALLOW | {"img_size": 70},
    "dinov3": SHALLOW,
    "siglip": SHALLOW,
    "naflexvit": SHALLOW,
    "cait": SHALLOW,
    "swin": {"depths": (1, 1, 1, 1)},
    "swinv2": {"depths": (1, 1, 1, 1)},
}


def small(name: str) -> tuple[nn.Module, object]:
    kwargs = KEYWORDS.get(name, {})
    model = timm.create_model(IMAGES[name], num_classes=7, **kwargs)
    channels, *size = model.pretrained_cfg["input_size"]
    size = [kwargs["img_size"]] * 2 if "img_size" in kwargs else size
    return model, torch.randn(2, channels, *size)


def hf_image(config: object, cls: type) -> tuple[nn.Module, object]:
    return cls(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


def hf_text(config: object, cls: type) -> tuple[nn.Module, object]:
    tokens = torch.randint(50, (2, 9))
    return cls(config).eval(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = TINY | {"image_size": 32, "patch_size": 8}

OTHERS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    "torchvision vit": lambda: (
        torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7),
        torch.randn(2, 3, 32, 32),
    ),
    "torchvision swin": lambda: (torchvision.models.swin_t(num_classes=7), torch.randn(1, 3, 64, 64)),
    "transformers ViT": lambda: hf_image(transformers.ViTConfig(**PATCHES), transformers.ViTForImageClassification),
    "transformers Dinov2": lambda: hf_image(
        transformers.Dinov2Config(**{k: v for k, v in PATCHES.items() if k != "intermediate_size"}),
        transformers.Dinov2ForImageClassification,
    ),
    "transformers CLIP": lambda: hf_image(transformers.CLIPVisionConfig(**PATCHES), transformers.CLIPVisionModel),
    "transformers BERT": lambda: hf_text(
        transformers.BertConfig(vocab_size=50, **TINY), transformers.BertForSequenceClassification
    ),
    "transformers GPT-2": lambda: hf_text(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16), transformers.GPT2LMHeadModel
    ),
}
MODELS = {**{name: (lambda name=name: small(name)) for name in IMAGES}, **OTHERS}
# Multiplied by other functions than linear maps and 2-D convolutions, or never.
NOT_MATRICES = (
    *("pos_embed", "pos_embedding", "position_embedding", "relative_position_bias_table", "attention_biases", "wpe", "wte"),
    *("cls_token", "class_token", "reg_token", "mask_token", "latent", "class_embedding", "word_embeddings"),
    *("token_type_embeddings", "logit_scale", "temperature"),
)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_matrix_weight_is_chosen_from_or_explained(name):
    model, batch = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    selection = fps.select(model, [batch], budget=fps.PerNeuron(1))

    matrices = {key for key, p in model.named_parameters() if p.dim() >= 2}
    assert set(selection) | set(selection.skipped) == matrices
    assert not set(selection) & set(selection.skipped)
    for key, reason in selection.skipped.items():
        expected = reason == "trained whole" or any(part in key for part in NOT_MATRICES)
        assert expected, f"{key} was not chosen from: {reason}"

    every = dict(model.named_parameters())
    for key, entries in selection.items():
        assert entries.layout.parameter_shape == tuple(every[key].shape)
        assert entries.row_offsets.diff().eq(1).all()  # one entry per output neuron
    heads = [key for key in selection.dense if every[key].dim() >= 2]
    assert len(heads) == (0 if name in ("transformers CLIP", "transformers GPT-2") else 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_transposed_and_tied_weights_of_gpt2():
    model, batch = OTHERS["transformers GPT-2"]()
    selection = fps.select(model, [batch], budget=fps.PerNeuron(2))
    entries = selection["transformer.h.0.attn.c_attn.weight"]
    assert entries.layout.shape == (96, 32)  # output neurons first, although Conv1D keeps [in, out]
    assert entries.mask().shape == (32, 96)
    assert entries.mask().sum(0).eq(2).all()
    assert selection.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in selection  # its other name is the one that counts


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "transformers ViT"])
def test_statistics_equal_those_of_hooks(name):
    """Where every weight belongs to an ``nn.Linear``, forward hooks see the same inputs."""
    model, batch = MODELS[name]()
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module, args, key=f"{path}.weight"):
                sums[key] = sums.get(key, 0) + args[0].flatten(0, -2).abs().double().sum(0)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    stats = fps.calibrate(model, [batch])
    assert set(sums) <= set(stats)
    for key, expected in sums.items():
        torch.testing.assert_close(stats[key].norm[0], expected, rtol=1e-5, atol=0)
