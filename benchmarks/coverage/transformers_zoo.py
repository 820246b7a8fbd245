"""Models of transformers, by the type that their configuration has, made small."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage.checks import Sample
from benchmarks.coverage.names import names

# What configurations call their sizes. Vocabularies are small, so that weights that multiply are most of a model, as in
# large ones.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_inner", "d_ff", "hidden_dim"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_decoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "num_mel_bins"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "bos_token_id"), 1),
    "vocab_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "max_position_embeddings": 32,
    "max_source_positions": 24,
    "max_target_positions": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "intermediate_size_mlp": 96,
    "projection_dim": 48,
    "conv_dim": [32] * 3,
    "conv_kernel": [5, 3, 3],
    "conv_stride": [3, 2, 2],
    "num_feat_extract_layers": 3,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OTHERS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "clip": lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 32, 32)},
    "siglip": lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 32, 32)},
    "videomae": lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    "vivit": lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    "wav2vec2": lambda: {"input_values": torch.randn(2, 800)},
    "hubert": lambda: {"input_values": torch.randn(2, 800)},
    "whisper": lambda: {"input_features": torch.randn(2, 16, 48), "decoder_input_ids": _tokens()},
    "audio-spectrogram-transformer": lambda: {"input_values": torch.randn(2, 32, 16)},
    "hifigan": lambda: {"spectrogram": torch.randn(2, 20, 16)},
    "qwen2_vl, vision": lambda: {
        "hidden_states": torch.randn(32, 3 * 2 * 14 * 14),
        "grid_thw": torch.tensor([[2, 4, 4]]),
    },
}
FIXED: dict[str, dict[str, Any]] = {
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16},
    "codegen": {"rotary_dim": 8},
    "deepseek_v3": {"head_dim": 8},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "d_head": 16, "architectures": ["FunnelModel"]},
    "swin": {"window_size": 2, "depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "hidden_size": 64},
    "gptj": {"rotary_dim": 8},
}


def _tokens() -> Tensor:
    return torch.randint(3, 32, (2, 12))


def shrunk(config: Any) -> Any:
    """A configuration, and those inside of it, with small sizes."""
    for name, size in SIZES.items():
        own = getattr(config, name, None)
        computed = isinstance(getattr(type(config), name, None), property)
        if own is not None and not computed and isinstance(own, list | tuple) == isinstance(size, list):
            try:
                setattr(config, name, size)
            except (AttributeError, NotImplementedError):
                continue  # it is computed from the others
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            shrunk(inner)
    return config


def make(kind: str, batch: Callable[[], dict[str, Tensor]]) -> Sample:
    """A small model of a type."""
    from transformers import CONFIG_MAPPING, AutoModel, SpeechT5HifiGan, SpeechT5HifiGanConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    if kind == "hifigan":
        config = SpeechT5HifiGanConfig(
            model_in_dim=16, upsample_initial_channel=64, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8]
        )
        model = SpeechT5HifiGan(config)
        model.apply_weight_norm()
        return Sample(model, batch())
    if kind == "qwen2_vl, vision":
        vision = Qwen2VLVisionConfig(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2)
        return Sample(Qwen2VisionTransformerPretrainedModel(vision), batch())
    config = shrunk(CONFIG_MAPPING[kind]())
    for name, value in FIXED.get(kind, {}).items():
        setattr(config, name, value)
    if kind == "dbrx":
        config.attn_config.rope_theta, config.attn_config.clip_qkv = 1e4, 8.0
    if kind == "siglip":
        config.text_config.projection_size = 64
    if isinstance(config.__dict__.get("layer_types"), list) and hasattr(config, "num_hidden_layers"):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    inputs = batch()
    if getattr(config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", _tokens())
    return Sample(AutoModel.from_config(config), inputs)


def zoo() -> dict[str, Callable[[], Sample]]:
    """Models by name."""
    batches: dict[str, Callable[[], dict[str, Tensor]]] = {
        **dict.fromkeys(names("transformers, texts"), lambda: {"input_ids": _tokens()}),
        **dict.fromkeys(names("transformers, images"), lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
        **OTHERS,
    }
    return {kind: partial(make, kind, batch) for kind, batch in batches.items()}
