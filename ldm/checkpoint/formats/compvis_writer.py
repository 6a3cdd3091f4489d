"""Writing what other programs read: CompVis's and DiT's single files; folder_writing.py does diffusers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.autoencoder_keys import fold_statistics, write_autoencoder
from ldm.checkpoint.backbone_keys import write_backbone
from ldm.checkpoint.components import Node, State, above, under
from ldm.checkpoint.conditioners import kind_of, text_node, weights_of
from ldm.checkpoint.families import CONDITION, FAMILIES, FIRST_STAGE, UNET
from ldm.checkpoint.files import write_file
from ldm.checkpoint.formats.compvis import CONFIG, POSITIONS, SCALE
from ldm.checkpoint.networks import BACKBONES, build_autoencoder, build_backbone, build_text, fit, supplied
from ldm.checkpoint.text_keys import write_text
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.dit import DiT, sincos_positions
from ldm.models.unet import UNet

KNOWN = ("eps", "v", "learned_range"), ("linear", "scaled_linear")  # predictions and noise that families have


def write_compvis(
    path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Write a single file as CompVis's readers know it, or DiT's; returns what it could not take along."""
    config, notes = dict(config), list[str]()
    file: State = {}
    if config.get("backbone"):
        backbone, weights = backbone_of(config["backbone"], state)
        if isinstance(backbone, DiT):
            file |= write_backbone(weights, backbone, "dit") | {POSITIONS: positions(backbone, config)}
            notes += ["a DiT file has no first stage: open it with --vae"] if config.get("autoencoder") else []
            config["autoencoder"] = None
        else:
            file |= above(write_backbone(weights, backbone, "compvis"), UNET)
        if config.get("conditioner") and isinstance(backbone, UNet):
            file |= above(write_conditioner(config["conditioner"], state), CONDITION)
    if config.get("autoencoder"):
        config["autoencoder"], stage, scale = stage_of(config["autoencoder"], state, notes, config.get("conditioner"))
        theirs = write_autoencoder(stage, build_autoencoder(config["autoencoder"]), "compvis")
        file |= above(theirs, FIRST_STAGE if config.get("backbone") else "") | {SCALE: scale}
    metadata = {CONFIG: json.dumps(config)}
    kind = config.get("prediction", {}).get("type")
    if kind in ("eps", "v"):
        metadata["modelspec.prediction_type"] = {"eps": "epsilon", "v": "v"}[kind]
    if config.get("backbone") and (kind not in KNOWN[0] or config["path"]["type"] not in KNOWN[1]):
        notes.append(f"other readers cannot be told of path {config['path']['type']} with prediction {kind}")
    write_file(path, file, metadata, dtype)
    return notes


def backbone_of(node: Node, state: Mapping[str, Tensor]) -> tuple[UNet | DiT, State]:
    """A configuration's backbone without memory, and its weights, which must be exactly its own."""
    weights = under(state, "backbone.")
    if node["type"] not in BACKBONES:
        raise CheckpointError("no other program knows this backbone", got=node["type"], expected=" or ".join(BACKBONES))
    try:
        network = build_backbone(node, supplied(node, weights))
    except (KeyError, IndexError) as error:
        raise CheckpointError("tensors are missing in the backbone", got=f"no {error}", expected="none") from error
    fit(weights, network, "backbone")
    return network, weights


def known_stage(node: Node) -> Autoencoder:
    """A configuration's first stage without memory, if it is of a kind that others have."""
    if node["type"] not in ("kl", "vq"):
        raise CheckpointError("no other program knows this first stage", got=node["type"], expected="kl or vq")
    return build_autoencoder(node)


def stage_of(
    node: Node, state: Mapping[str, Tensor], notes: list[str], conditioner: Node | None = None
) -> tuple[Node, State, Tensor]:
    """A first stage as others can express it: configuration, weights, and the one number that scales latents."""
    weights = under(state, "autoencoder.")
    fit(weights, known_stage(node), "first stage")
    if weights["scale"].ndim or weights["shift"].count_nonzero():
        if node["type"] != "kl":
            raise CheckpointError("others have no shift of codes", "autoencoder.shift", hint="our own format")
        if kind_of(conditioner) == "edit":  # which reads latents as they are before shift and scale
            raise CheckpointError("others have no shift of latents", "autoencoder.shift", hint="our own format")
        weights = fold_statistics(weights)
        weights |= {"shift": torch.zeros(()), "scale": torch.ones(())}
        notes.append("the latents' shift and scale are now inside the first stage's convolutions")
        node = {name: value for name, value in node.items() if name != "per_channel"}
    return node, weights, weights["scale"]


def write_conditioner(conditioner: Node, state: Mapping[str, Tensor]) -> State:
    """A conditioner's weights in the names of its family, without `cond_stage_model.`."""
    kind_of(conditioner)  # or an error
    node, weights = text_node(conditioner)[0], weights_of(conditioner, state)
    family = next((row for row in FAMILIES if row.conditioner == node["type"]), None)
    if family is None or (node["type"] == "label" and not node.get("width")):
        raise CheckpointError("CompVis has no such conditioner", got=node["type"], hint="our own format")
    if node["type"] == "label":
        return {"embedding.weight": weights["table.weight"]}
    theirs = write_tower(node, weights, family.layout or "")
    if node["type"] == "open_clip":
        theirs |= unread_block(theirs, node["layers"] - 1)
    return above(theirs, family.prefix.removeprefix(CONDITION))


def write_tower(node: Node, weights: State, layout: str) -> State:
    """A text encoder's weights in the names of a layout."""
    weights = under(weights, "transformer.")
    network = build_text(node)
    fit(weights, network, "text encoder")
    return write_text(weights, network, layout)  # type: ignore[arg-type]


def unread_block(state: State, number: int) -> State:
    """The published tower's last block, which SD 2 never reads and which every file has: zeros."""
    last, unread = f"transformer.resblocks.{number - 1}.", f"transformer.resblocks.{number}."
    return {name.replace(last, unread): torch.zeros_like(x) for name, x in state.items() if name.startswith(last)}


def positions(dit: DiT, config: Mapping[str, Any]) -> Tensor:
    """The fixed table of positions that DiT's files hold, for the size of the configuration."""
    side = config.get("size", 256) // 8 // dit.patch
    return sincos_positions(dit.width, side, side, torch.device("cpu"))
