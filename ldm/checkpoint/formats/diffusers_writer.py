"""Writing folders that diffusers opens: each part with the configuration of its class."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.checkpoint.backbone_keys import write_backbone
from ldm.checkpoint.components import Node, State
from ldm.checkpoint.conditioners import kind_of, text_node, weights_of
from ldm.checkpoint.files import flush_folder, replacing, write_file
from ldm.checkpoint.formats.compvis_writer import backbone_of, known_stage, stage_of, write_tower
from ldm.checkpoint.formats.diffusers import INDEX
from ldm.checkpoint.networks import build_autoencoder
from ldm.checkpoint.schedules import write_scheduler
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.dit import DiT, DiTBlock
from ldm.models.unet import UNet

PIPELINES = {  # (conditioner, what extra channels are for) -> their class, and the name of its first stage's folder
    ("clip", ""): ("StableDiffusionPipeline", "vae"),
    ("clip", "inpainting"): ("StableDiffusionInpaintPipeline", "vae"),
    ("clip", "edit"): ("StableDiffusionInstructPix2PixPipeline", "vae"),
    ("open_clip", ""): ("StableDiffusionPipeline", "vae"),
    ("open_clip", "inpainting"): ("StableDiffusionInpaintPipeline", "vae"),
    ("open_clip", "edit"): ("StableDiffusionInstructPix2PixPipeline", "vae"),
    ("label", ""): ("DiTPipeline", "vae"),
    (None, ""): ("LDMPipeline", "vqvae"),
}


def write_diffusers(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write a pipeline, or a first stage alone, all or nothing; returns what it changed on the way.

    `tokenizer` is CLIP's kind, with `ids`, `merges` and `pad`, where the model reads text.
    """
    notes: list[str] = []
    with new_folder(Path(folder)) as target:
        if not config.get("backbone"):
            write_stage(target, config["autoencoder"], None, state, notes, dtype)
        else:
            write_pipeline(target, config, state, tokenizer, notes, dtype)
    return notes


def write_pipeline(
    target: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any, notes: list[str], dtype: Any
) -> None:
    """Each part of a pipeline in its own folder, and their index."""
    conditioner, stage = config.get("conditioner"), config.get("autoencoder")
    node = text_node(conditioner)[0] if conditioner else None
    kind = (node["type"] if node else None, kind_of(conditioner))
    backbone, weights = backbone_of(config["backbone"], state)
    if kind not in PIPELINES or isinstance(backbone, DiT) != (kind[0] == "label"):
        got = f"{config['backbone']['type']} with {kind[0]}"
        raise CheckpointError("diffusers has no such pipeline", got=got, expected="Stable Diffusion, LDM or DiT")
    if not stage:
        raise CheckpointError("no first stage to write", hint="--vae")
    pipeline, stage_name = PIPELINES[kind]
    index: Node = {"_class_name": pipeline, "_diffusers_version": "0.42.0"}
    settings = backbone_settings(backbone, config["size"] // known_stage(stage).factor)
    name = "transformer" if isinstance(backbone, DiT) else "unet"
    index[name] = write_part(target / name, settings, write_backbone(weights, backbone, "diffusers"), dtype)
    index[stage_name] = write_stage(target / stage_name, stage, conditioner, state, notes, dtype)
    if node and conditioner and kind[0] != "label":
        tower = write_tower(node, weights_of(conditioner, state), "clip")
        index["text_encoder"] = write_text_encoder(target / "text_encoder", node, tower, dtype)
        index["tokenizer"] = write_tokenizer(target / "tokenizer", tokenizer, node["length"])
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        index["requires_safety_checker"] = False
    scheduler = write_scheduler(config, notes)
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(target / INDEX, index)


def backbone_settings(backbone: UNet | DiT, size: int) -> Node:
    """The configuration of diffusers' class for a backbone."""
    if isinstance(backbone, DiT):
        return dit_settings(backbone, size)
    encoder = backbone.plan[: len(backbone.encoder)]
    ends = [row for row, after in zip(encoder, [*encoder[1:], None]) if after is None or after.kind == "down"]
    widths, attend = [row.out_channels for row in ends], [row.attend > 0 for row in ends]
    settings = {
        "sample_size": size,
        "in_channels": backbone.in_channels,
        "out_channels": backbone.out.out_channels,
        "block_out_channels": widths,
        "layers_per_block": sum(row.kind == "res" for row in encoder) // len(ends),
        "resnet_time_scale_shift": "scale_shift" if backbone.scale_shift else "default",
        "num_class_embeds": backbone.time.classes,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if backbone.context is None:
        return settings | adm_settings(backbone, attend)
    depth = [row.attend for row in ends]
    depth[-1] = backbone.plan[len(encoder)].attend
    counts = [backbone.heads_of(width) for width in widths]
    return settings | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [f"{'CrossAttn' * a}DownBlock2D" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attend)],
        "attention_head_dim": counts[0] if len(set(counts)) == 1 else counts,  # their name for the count
        "transformer_layers_per_block": depth[0] if len(set(depth)) == 1 else [count or 1 for count in depth],
        "cross_attention_dim": backbone.context,
        "use_linear_projection": backbone.linear,
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


def dit_settings(dit: DiT, size: int) -> Node:
    """The configuration of DiTTransformer2DModel."""
    block = dit.blocks[0]
    assert isinstance(block, DiTBlock)
    heads = block.attention.heads
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": dit.width // heads,
        "in_channels": dit.in_channels,
        "out_channels": dit.out_channels,
        "num_layers": len(dit.blocks),
        "sample_size": size,
        "patch_size": dit.patch,
        "num_embeds_ada_norm": (dit.time.classes or 1) - 1,
        "norm_eps": 1e-6,
    }


def write_stage(
    target: Path, node: Node, conditioner: Node | None, state: Mapping[str, Tensor], notes: list[str], dtype: Any
) -> list[str]:
    """A first stage and its configuration; who else reads its latents may forbid a change."""
    node, weights, scale = stage_of(node, state, notes, conditioner)
    network = build_autoencoder(node)
    settings = stage_settings(network, node) | {"scaling_factor": float(f"{scale.item():.8g}")}
    return write_part(target, settings, write_autoencoder(weights, network, "diffusers"), dtype)


def stage_settings(network: Autoencoder, node: Node) -> Node:
    """The configuration of AutoencoderKL or VQModel."""
    levels = range(len(node["multipliers"]))
    attend = [2**level in node["attend"] for level in levels]
    settings: Node = {
        "block_out_channels": [node["channels"] * multiplier for multiplier in node["multipliers"]],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attend],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attend)],
        "layers_per_block": node["blocks"],
        "latent_channels": network.latent_channels,
        "mid_block_add_attention": node["mid_attention"],
        "norm_num_groups": 32,
        "act_fn": "silu",
    }
    if node["type"] == "vq":
        return settings | {"_class_name": "VQModel", "num_vq_embeddings": node["codes"]}
    return settings | {"_class_name": "AutoencoderKL", "force_upcast": True}


def write_text_encoder(target: Path, node: Node, weights: State, dtype: torch.dtype | None) -> list[str]:
    """CLIP's text encoder as transformers opens it; of OpenCLIP's, the layers that are read."""
    open_clip = node["type"] == "open_clip"
    settings = {
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
    write_json(target / "config.json", settings)
    write_file(target / "model.safetensors", weights, {}, dtype)
    return ["transformers", "CLIPTextModel"]


def write_tokenizer(target: Path, tokenizer: Any, length: int) -> list[str]:
    """CLIP's tokenizer as transformers opens it."""
    if not hasattr(tokenizer, "merges"):
        got = type(tokenizer).__name__
        raise CheckpointError("a tokenizer of CLIP's kind must be written too", str(target), got, "ids and merges")
    names = {number: token for token, number in tokenizer.ids.items()}
    special = {
        "bos_token": names[tokenizer.start],
        "eos_token": names[tokenizer.end],
        "unk_token": names[tokenizer.end],
        "pad_token": names[tokenizer.pad],
    }
    write_json(target / "vocab.json", tokenizer.ids)
    write_json(target / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    write_json(target / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges), ""]
    (target / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return ["transformers", "CLIPTokenizer"]


def write_part(target: Path, settings: Node, weights: State, dtype: torch.dtype | None) -> list[str]:
    """A model's configuration and weights; returns its entry in the index."""
    write_json(target / "config.json", {**settings, "_diffusers_version": "0.42.0"})
    write_file(target / "diffusion_pytorch_model.safetensors", weights, {}, dtype)
    return ["diffusers", settings["_class_name"]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An object as a JSON file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when all is written, and leaves nothing behind otherwise."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError("exists already", str(folder), hint="another name")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, folder)
        flush_folder(folder.parent)
    except OSError as error:
        raise CheckpointError("cannot be written", str(folder), error.strerror or str(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
