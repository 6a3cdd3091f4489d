"""Reading the folders that diffusers writes: a whole pipeline, or one of its first stages."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import Node, State, above, open_autoencoder, open_backbone, open_text
from ldm.checkpoint.conditioners import compose, extra_kind
from ldm.checkpoint.files import open_file
from ldm.checkpoint.schedules import read_scheduler
from ldm.errors import CheckpointError

INDEX = "model_index.json"
READ = ("unet", "transformer", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler")
WEIGHTED = ("text_encoder", "transformer", "unet", "vae", "vqvae")  # in the order of the alphabet
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
STEMS = ("diffusion_pytorch_model", "model")
FIXED_POSITIONS = "pos_embed.pos_embed"
CFG = {"Stable Diffusion 1": 7.5, "Stable Diffusion 2": 7.5, "DiT": 4.0, "LDM unconditional": 1.0}
FIRST_STAGES = ("AutoencoderKL", "VQModel")
ONLY = {  # what else would need another network than ours
    "act_fn": ("silu", "gelu-approximate"),
    "norm_num_groups": (32,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "norm_type": ("ada_norm_zero", "group"),
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
}
UNETS = {"norm_eps": (1e-5,)}  # a Transformer2DModel's is not that of its blocks


def read_folder(folder: Path) -> Checkpoint:
    """What a folder of diffusers holds."""
    if not (folder / INDEX).is_file():
        return read_component(folder)
    index = read_json(folder / INDEX)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    strange = [name for name in parts if name not in READ + NOT_NEEDED]
    backbones = [name for name in ("unet", "transformer") if name in parts]
    if strange or len(backbones) != 1:
        got = f"{index.get('_class_name')} with {', '.join(strange or parts)}"
        raise CheckpointError("another kind of pipeline", str(folder), got, "Stable Diffusion 1 or 2, LDM or DiT")
    notes = [f"left out: {name}" for name in NOT_NEEDED if name in parts]
    return read_pipeline(folder, backbones[0], parts, notes)


def read_pipeline(folder: Path, backbone: str, parts: list[str], notes: list[str]) -> Checkpoint:
    """A whole pipeline: each part from its own folder."""
    settings, weights = read_part(folder / backbone)
    heads = {"heads": settings["num_attention_heads"]} if backbone == "transformer" else unet_heads(settings)
    weights = {name: x for name, x in weights.items() if name != FIXED_POSITIONS}
    node, given, state = open_backbone(weights, "diffusers", heads)
    family, conditioner, condition = open_condition(folder, parts, given)
    kind = extra_kind(given, str(folder))
    conditioner, condition = compose(conditioner, condition, kind)
    autoencoder, stage = open_stage(folder, parts, notes)
    if "scheduler" not in parts:
        raise CheckpointError("a pipeline without its scheduler, which knows its noise", str(folder), ", ".join(parts))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    config: Node = {"format": 1, **read_scheduler(scheduler, notes), "backbone": node, "conditioner": conditioner}
    if given["learned_sigma"] and config["prediction"]["type"] != "learned_range":
        config["prediction"] = {"type": "learned_range", "of": config["prediction"]}
    config |= {"guidance": {"cfg": CFG[family]}, "autoencoder": autoencoder}
    side = settings.get("sample_size") or 64
    pixels = autoencoder is None and backbone == "unet"  # a DiT's folder may come without its first stage
    config["size"] = (side if isinstance(side, int) else side[0]) * (1 if pixels else factor_of(autoencoder))
    tokenizer = str(folder / "tokenizer") if "tokenizer" in parts else None
    name = ", ".join(word for word in (family, kind, "diffusers folder") if word)
    files = [file for part in WEIGHTED if part in parts for file in weights_of(folder / part)]
    return Checkpoint(config, state | condition | stage, name, files, tokenizer, notes)


def open_condition(folder: Path, parts: list[str], given: Node) -> tuple[str, Node | None, State]:
    """The family that a pipeline's condition makes it, and its conditioner."""
    if "text_encoder" in parts:
        encoder, state = open_encoder(folder / "text_encoder")
        return {"clip": "Stable Diffusion 1", "open_clip": "Stable Diffusion 2"}[encoder["type"]], encoder, state
    if given["context"]:
        raise CheckpointError("a U-Net that reads text, without its encoder", str(folder), expected="text_encoder")
    if given["classes"]:
        return "DiT", {"type": "label", "classes": given["classes"], "null": given["classes"] - 1}, {}
    return "LDM unconditional", None, {}


def factor_of(autoencoder: Node | None) -> int:
    """Pixels to a latent."""
    return 2 ** (len(autoencoder["multipliers"]) - 1) if autoencoder else 8


def read_component(folder: Path) -> Checkpoint:
    """A folder without an index: a first stage's own, or an error."""
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if settings.get("_class_name") not in FIRST_STAGES:
        got = settings.get("_class_name") or "neither that nor config.json"
        raise CheckpointError(f"a folder without {INDEX}", str(folder), got, "a folder that diffusers has written")
    node, state = open_vae(folder)
    kind = {"kl": "KL first stage", "vq": "VQ first stage"}[node["type"]]
    return Checkpoint({"format": 1, "autoencoder": node}, state, f"{kind}, diffusers folder", weights_of(folder))


def open_stage(folder: Path, parts: list[str], notes: list[str]) -> tuple[Node | None, State]:
    """The pipeline's first stage, if it has one."""
    for name in ("vae", "vqvae"):
        if name in parts:
            return open_vae(folder / name)
    notes.append("no first stage inside: give one with --vae")
    return None, {}


def open_vae(folder: Path) -> tuple[Node, State]:
    """A first stage from its own folder; diffusers' pipelines of these families ignore a shift, and so do we."""
    settings, weights = read_part(folder)
    default = 0.18215 if settings.get("_class_name") != "VQModel" else 1.0
    scale = torch.tensor(settings.get("scaling_factor") or default)
    return open_autoencoder(weights, scale, torch.zeros(()))


def open_encoder(folder: Path) -> tuple[Node, State]:
    """A text encoder from its own folder: CLIP's, or OpenCLIP's, whose activation gives it away."""
    settings, weights = read_part(folder)
    if settings.get("intermediate_size", 4 * settings["hidden_size"]) != 4 * settings["hidden_size"]:
        got = f"{settings['intermediate_size']} for {settings['hidden_size']}"
        raise CheckpointError("another text encoder", str(folder), got, "feed-forward layers four times the width")
    kind = {"quick_gelu": "clip", "gelu": "open_clip"}[settings.get("hidden_act", "quick_gelu")]
    others = {"heads": settings["num_attention_heads"]}
    if kind == "open_clip":
        others["layers"] = settings["num_hidden_layers"] + 1  # counted as published, with the last one unread
    node, state = open_text(weights, "clip", kind, **others)
    return node, above(state, "conditioner.")


def unet_heads(settings: Mapping[str, Any]) -> dict[str, int]:
    """A U-Net's heads, which UNet2DConditionModel calls head dims, or their width."""
    said = settings.get("num_attention_heads") or settings.get("attention_head_dim")
    if "cross_attention_dim" not in settings:  # UNet2DModel means what it says
        return {"head_width": said} if said else {"heads": 1}
    levels = settings["block_out_channels"]
    counts = [said or 8] * len(levels) if isinstance(said, int | None) else list(said)
    if len(set(counts)) == 1:
        return {"heads": counts[0]}
    widths = {width // count for width, count in zip(levels, counts)}
    if len(widths) > 1:
        raise CheckpointError("heads of several widths", "unet/config.json", str(sorted(widths)), "one width")
    return {"head_width": widths.pop()}


def read_part(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A part's settings, none of which may ask for what our networks cannot do, and its weights."""
    settings = read_json(folder / "config.json")
    only = ONLY | (UNETS if settings.get("_class_name", "").startswith("UNet") else {})
    for name, legal in only.items():
        if settings.get(name, legal[0]) not in legal:
            expected = " or ".join(map(str, legal))
            raise CheckpointError(f"{name}: not known here", str(folder), str(settings[name]), expected)
    return settings, ChainMap(*(open_file(file) for file in weights_of(folder)))  # type: ignore[arg-type]


def weights_of(folder: Path) -> list[Path]:
    """A part's files: one, the shards that an index lists, or either of the one variant (fp16) that there is."""
    for stem in STEMS:
        for ending in ("safetensors", "safetensors.index.json", "safetensors.index.*.json", "*.safetensors"):
            found = sorted(folder.glob(f"{stem}.{ending}"))
            if len(found) > 1:
                got = ", ".join(path.name for path in found)
                raise CheckpointError("several variants of the weights", str(folder), got, "one", "without the others")
            if found and ending.endswith(".json"):
                names = sorted(set(read_json(found[0])["weight_map"].values()))
                return [folder / Path(name).name for name in names]
            if found:
                return found
    pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin"))) or "none"
    hint = "diffusers' save_pretrained(..., safe_serialization=True)"
    raise CheckpointError("no weights in safetensors", str(folder), pickles, f"{STEMS[0]}.safetensors", hint)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read", str(path), str(error), "a JSON file as diffusers writes it") from error
    if not isinstance(content, dict):
        raise CheckpointError("not an object", str(path), type(content).__name__, "a JSON file as diffusers writes it")
    return content
