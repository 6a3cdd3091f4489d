"""The settings of diffusers' and transformers' classes for our networks, and what they say of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.unet import UNet

Node = dict[str, Any]


def unet_heads(settings: Mapping[str, Any]) -> Node:
    """A U-Net's heads, which UNet2DConditionModel calls head dims, or their width."""
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim")
    if "cross_attention_dim" not in settings:  # a UNet2DModel's really is their width
        return {"head_width": heads} if heads else {"heads": 1}
    levels = settings["block_out_channels"]
    counts = [heads or 8] * len(levels) if isinstance(heads, int | None) else list(heads)
    if len(set(counts)) == 1:
        return {"heads": counts[0]}
    widths = {width // max(1, count) for width, count in zip(levels, counts)}
    if len(widths) > 1:
        raise CheckpointError("heads of several widths", "unet/config.json", str(sorted(widths)), "one width")
    return {"head_width": widths.pop()}


def unet_settings(unet: UNet, size: int) -> Node:
    """The settings of UNet2DConditionModel or, without text, UNet2DModel."""
    encoder = unet.plan[: len(unet.encoder)]
    ends = [row for row, after in zip(encoder, [*encoder[1:], None]) if after is None or after.kind == "down"]
    widths, attend = [row.out_channels for row in ends], [row.attend > 0 for row in ends]
    settings = {
        "sample_size": size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out.out_channels,
        "block_out_channels": widths,
        "layers_per_block": sum(row.kind == "res" for row in encoder) // len(ends),
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
        "num_class_embeds": unet.time.classes,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if unet.context is None:
        return settings | adm_settings(unet, attend)
    depth = [row.attend for row in ends]
    depth[-1] = unet.plan[len(encoder)].attend
    counts = [unet.heads_of(width) for width in widths]
    return settings | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [f"{'CrossAttn' * a}DownBlock2D" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attend)],
        "attention_head_dim": counts[0] if len(set(counts)) == 1 else counts,  # their name for the count
        "transformer_layers_per_block": depth[0] if len(set(depth)) == 1 else [count or 1 for count in depth],
        "cross_attention_dim": unet.context,
        "use_linear_projection": unet.linear,
    }


def adm_settings(unet: UNet, attend: list[bool]) -> Node:
    """What UNet2DModel needs beside, for attention without a context."""
    if unet.heads not in (None, 1):
        got = f"{unet.heads} heads at every level"
        raise CheckpointError("diffusers' UNet2DModel has one width of heads", "unet", got, "head_width", "compvis")
    plain = ("ResnetDown", "ResnetUp") if unet.resample == "residual" else ("Down", "Up")
    kinds = [("AttnDown", "AttnUp") if a else plain for a in attend]
    resample = {"residual": "resnet", "conv": "conv"}[unet.resample]
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": [f"{down}{'sample' * (down == 'ResnetDown')}Block2D" for down, _ in kinds],
        "up_block_types": [f"{up}{'sample' * (up == 'ResnetUp')}Block2D" for _, up in reversed(kinds)],
        "attention_head_dim": unet.head_width,
        "attn_norm_num_groups": 32,
        "downsample_type": resample,
        "upsample_type": resample,
    }


def autoencoder_settings(network: Autoencoder, node: Node, scale: float) -> Node:
    """The settings of AutoencoderKL or VQModel."""
    attend = [2**level in node["attend"] for level in range(len(node["multipliers"]))]
    settings: Node = {
        "block_out_channels": [node["channels"] * multiplier for multiplier in node["multipliers"]],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attend],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attend)],
        "layers_per_block": node["blocks"],
        "latent_channels": network.latent_channels,
        "mid_block_add_attention": node["mid_attention"],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": float(f"{scale:.8g}"),
    }
    return settings | ({"num_vq_embeddings": node["codes"]} if node["type"] == "vq" else {"force_upcast": True})


def text_settings(node: Node) -> Node:
    """The settings of CLIPTextModel; of OpenCLIP's encoder, for the layers that are read."""
    open_clip = node["type"] == "open_clip"
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": node["width"],
        "intermediate_size": 4 * node["width"],
        "num_hidden_layers": node["layers"] - open_clip,
        "num_attention_heads": node["heads"],
        "max_position_embeddings": node["length"],
        "vocab_size": node["vocabulary"],
        "projection_dim": node["width"],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": node["vocabulary"] - 2,
        "eos_token_id": node["vocabulary"] - 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    }


def tokenizer_files(tokenizer: Any, length: int, folder: str) -> dict[str, Node | str]:
    """CLIP's tokenizer as transformers opens it, by file name."""
    if not hasattr(tokenizer, "merges"):
        got = type(tokenizer).__name__
        raise CheckpointError("the folder needs a tokenizer of CLIP's kind", folder, got, "ids and merges")
    names = {number: token for token, number in tokenizer.ids.items()}
    special = {
        "bos_token": names[tokenizer.start],
        "eos_token": names[tokenizer.end],
        "unk_token": names[tokenizer.end],
        "pad_token": names[tokenizer.pad],
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    return {
        f"{folder}/vocab.json": tokenizer.ids,
        f"{folder}/special_tokens_map.json": special,
        f"{folder}/tokenizer_config.json": settings,
        f"{folder}/merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges), ""]),
    }
