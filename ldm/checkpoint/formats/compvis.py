"""Single files with the prefixes of CompVis's programs, which other programs of their time share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import Tensors, write_file
from ldm.checkpoint.networks import check_sizes
from ldm.checkpoint.rename import State, refuse, under

Node = dict[str, Any]

UNET = "model.diffusion_model."
CONDITION = "cond_stage_model."
FIRST_STAGE = "first_stage_model."
SCALE = "scale_factor"  # of the latents
CONFIG = "config"  # the metadata's key of our configuration
PREDICTION = "modelspec.prediction_type"  # the metadata's key that other programs read too
PREDICTIONS = {"epsilon": "eps", "v": "v"}
KNOWN = ("eps", "v", "learned_range"), ("linear", "scaled_linear")  # predictions and paths that other readers assume

IGNORED = {  # what files hold beside weights, by prefix
    "model_ema.": "moving averages of the weights",
    "first_stage_model.loss.": "the first stage's losses",
    "loss.": "the first stage's losses",
    "cond_stage_model.logit_scale": "CLIP's projections for comparing texts and pictures",
    "cond_stage_model.text_projection": "CLIP's projections for comparing texts and pictures",
    "embedding_manager.": "textual inversion's embeddings",
    "lvlb_weights": "noise schedule tables",
    "logvar": "noise schedule tables",
    "posterior_": "noise schedule tables",
    "alphas_cumprod": "noise schedule tables",
    "sqrt_": "noise schedule tables",
    "log_one_minus_": "noise schedule tables",
    "betas": "noise schedule tables",
}


def stored_config(tensors: Tensors) -> Node:
    """The configuration that we wrote beside others' names, or an empty one."""
    try:
        config = json.loads(tensors.metadata.get(CONFIG, "{}"))
    except ValueError:
        return {}
    parts = ("backbone", "conditioner", "autoencoder")
    if not isinstance(config, dict) or config.get("format") != 1:
        return {}
    if not all(isinstance(config.get(part), dict | None) for part in parts):
        return {}
    check_sizes(config, tensors.shapes, str(tensors.path))
    return config


def stored_prediction(tensors: Tensors) -> str:
    """The prediction that the metadata name, or an empty string."""
    return PREDICTIONS.get(tensors.metadata.get(PREDICTION, ""), "")


def ignore(tensors: Tensors, *prefixes: str) -> list[str]:
    """Notes of what the file holds beside the parts with these prefixes; unknown tensors are refused."""
    others = [name for name in tensors if not name.startswith(prefixes) and name != SCALE]
    refuse("unexpected tensors", [name for name in others if not name.startswith(tuple(IGNORED))])
    found = {what for name in others for prefix, what in IGNORED.items() if name.startswith(prefix)}
    return [f"left out: {what}" for what in sorted(found)]


def averaged(tensors: Tensors, notes: list[str]) -> State:
    """The U-Net's moving average, whose names CompVis writes without dots, or without one its weights."""
    flat = {
        name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in tensors if name.startswith(UNET)
    }
    if not all(average in tensors for average in flat.values()):
        return under(tensors, UNET)
    notes.append("using the EMA weights, as published")
    return {name.removeprefix(UNET): tensors[average] for name, average in flat.items()}


def write(
    path: str | Path, tensors: Mapping[str, Tensor], config: Node, notes: list[str], dtype: torch.dtype | None
) -> None:
    """Write a single file with our configuration in its metadata."""
    metadata = {CONFIG: json.dumps(config)}
    kind = config.get("prediction", {}).get("type")
    if kind in PREDICTIONS.values():
        metadata[PREDICTION] = "epsilon" if kind == "eps" else kind
    if config.get("backbone") and (kind not in KNOWN[0] or config["path"]["type"] not in KNOWN[1]):
        notes.append(f"other programs cannot read path {config['path']['type']} with prediction {kind} from the file")
    write_file(path, tensors, metadata, dtype)
