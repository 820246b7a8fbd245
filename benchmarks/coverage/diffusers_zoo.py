"""Models of diffusers, made small."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.coverage.checks import Sample

NAMES = (
    "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "ControlNetModel", "AutoencoderKL", "VQModel",
    "DiTTransformer2DModel", "SD3Transformer2DModel", "UNetSpatioTemporalConditionModel",
)  # fmt: skip


def _make(name: str) -> Sample:
    import diffusers

    cross = {"cross_attention_dim": 16, "block_out_channels": (32, 32), "norm_num_groups": 8, "attention_head_dim": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    volumes = {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    image, times, texts = torch.randn(2, 4, 16, 16), torch.tensor([1, 3]), torch.randn(2, 5, 16)
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UNet2DModel": (
            {
                "sample_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (32, 32),
                "norm_num_groups": 8,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
            {"sample": image, "timestep": times},
        ),
        "UNet2DConditionModel": (
            {**cross, **blocks, "sample_size": 16},
            {"sample": image, "timestep": times, "encoder_hidden_states": texts},
        ),
        "UNet3DConditionModel": (
            {**cross, **volumes, "sample_size": 16},
            {"sample": torch.randn(2, 4, 3, 16, 16), "timestep": times, "encoder_hidden_states": texts},
        ),
        "ControlNetModel": (
            {**cross, "down_block_types": blocks["down_block_types"], "conditioning_embedding_out_channels": (16, 32)},
            {
                "sample": image,
                "timestep": times,
                "encoder_hidden_states": texts,
                "controlnet_cond": torch.randn(2, 3, 32, 32),
            },
        ),
        "AutoencoderKL": (
            {
                "block_out_channels": (32, 32),
                "norm_num_groups": 8,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
            },
            {"sample": torch.randn(2, 3, 16, 16)},
        ),
        "VQModel": ({"block_out_channels": (32,), "norm_num_groups": 8}, {"sample": torch.randn(2, 3, 16, 16)}),
        "DiTTransformer2DModel": (
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "num_layers": 2,
                "sample_size": 16,
                "norm_num_groups": 8,
            },
            {"hidden_states": image, "timestep": times, "class_labels": torch.tensor([1, 2])},
        ),
        "SD3Transformer2DModel": (
            {
                "sample_size": 16,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "pos_embed_max_size": 16,
            },
            {
                "hidden_states": image,
                "timestep": times,
                "encoder_hidden_states": texts,
                "pooled_projections": torch.randn(2, 16),
            },
        ),
        "UNetSpatioTemporalConditionModel": (
            {
                "sample_size": 16,
                "in_channels": 4,
                "block_out_channels": (32, 32),
                "cross_attention_dim": 16,
                "num_attention_heads": 2,
                "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                "projection_class_embeddings_input_dim": 96,
                "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                "addition_time_embed_dim": 32,
            },
            {
                "sample": torch.randn(2, 2, 4, 16, 16),
                "timestep": torch.tensor([1.0, 3.0]),
                "encoder_hidden_states": torch.randn(2, 1, 16),
                "added_time_ids": torch.randn(2, 3),
            },
        ),
    }
    config, batch = options[name]
    return Sample(getattr(diffusers, name)(**config), batch)


def zoo() -> dict[str, Callable[[], Sample]]:
    """Models by name."""
    return {name: partial(_make, name) for name in NAMES}
