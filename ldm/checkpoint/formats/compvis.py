"""Single files of other programs: Stable Diffusion and latent-diffusion (CompVis), DiT, and first stages alone."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import Node, State, open_autoencoder, open_backbone, under
from ldm.checkpoint.conditioners import extra_kind, open_conditioner
from ldm.checkpoint.families import FAMILIES, FIRST_STAGE, IGNORED, STRANGERS, UNET, V_DEVIATION
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.rename import refuse
from ldm.checkpoint.schedules import path_of_betas
from ldm.errors import CheckpointError
from ldm.models.dit import sincos_positions

DIT, POSITIONS = "x_embedder.proj.weight", "pos_embed"
CONFIG = "config"  # the metadata's key of our configuration
SCALE = "scale_factor"  # CompVis's name of the latents' scale
SD_SCALE = 0.18215


def read_single(tensors: Tensors) -> Checkpoint:
    """What a single file holds, found out by looking at its names and shapes."""
    stranger = next((what for name in tensors for start, what in STRANGERS.items() if name.startswith(start)), None)
    if not stranger and DIT in tensors:
        return read_dit(tensors)
    if not stranger and f"{UNET}input_blocks.0.0.weight" in tensors:
        return read_model(tensors)
    for prefix in () if stranger else (FIRST_STAGE, ""):
        if f"{prefix}encoder.conv_in.weight" in tensors and f"{prefix}decoder.conv_in.weight" in tensors:
            return read_first_stage(tensors, prefix)
    got = stranger or f"{len(tensors)} tensors: {', '.join(sorted(tensors)[:5])}"
    families = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    expected = f"our own format, DiT, a first stage, {families}"
    raise CheckpointError("another architecture's file", str(tensors.path), got, expected)


def stored_config(tensors: Tensors) -> Node:
    """The configuration that we wrote beside somebody else's names, or nothing."""
    try:
        config = json.loads(tensors.metadata.get(CONFIG, "{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) and config.get("format") == 1 else {}


def read_model(tensors: Tensors) -> Checkpoint:
    """A latent diffusion model of the CompVis family."""
    family = next(row for row in FAMILIES if row.mark in tensors)
    stored, where = stored_config(tensors), str(tensors.path)
    notes = pass_over(tensors, (UNET, FIRST_STAGE, *([family.prefix] if family.prefix else [])))
    weights = averaged(tensors, notes) if family.averaged else under(tensors, UNET)
    backbone, given, state = open_backbone(weights, "compvis", family.heads, stored.get("backbone"))
    if (given["context"] is None) != (family.conditioner is None):
        got, hint = f"a context of {given['context']}", "the file of the whole model"
        raise CheckpointError("a U-Net without the encoder of its condition", where, got, hint=hint)
    kind = extra_kind(given, where)
    text = under(tensors, family.prefix)
    conditioner, condition = open_conditioner(family, text, kind, stored.get("conditioner"))
    autoencoder, first_stage = open_stage(tensors, FIRST_STAGE, stored.get("autoencoder"), notes)
    guessed = family.tells_v and not kind
    v = stored["prediction"]["type"] == "v" if stored else says_v(tensors, state, notes, guessed)
    config = stored or {
        "format": 1,
        "path": path_of_betas(tensors["betas"]) if "betas" in tensors else dict(family.path),
        "prediction": {"type": "v" if v else "eps"},
        "backbone": backbone,
        "conditioner": conditioner,
        "guidance": {"cfg": family.cfg},
        "spacing": {"type": "leading", "steps": 50},
        "solver": {"type": "dpmpp_2m"},
        "autoencoder": autoencoder,
        "size": 768 if v and family.tells_v else family.size,
    }
    name = ", ".join(word for word in (family.name, kind, "v-prediction" if v else "") if word)
    return Checkpoint(config, state | condition | first_stage, name, [tensors.path], notes=notes)


def pass_over(tensors: Tensors, prefixes: tuple[str, ...]) -> list[str]:
    """What the file has beside the parts that begin so, as notes; what nobody knows is refused."""
    others = [name for name in tensors if not name.startswith(prefixes) and name != SCALE]
    refuse("tensors without a place", [name for name in others if not name.startswith(tuple(IGNORED))])
    found = {what for name in others for beginning, what in IGNORED.items() if name.startswith(beginning)}
    return [f"left out: {what}" for what in sorted(found)]


def averaged(tensors: Tensors, notes: list[str]) -> State:
    """A U-Net's moving average, whose names CompVis writes without their dots, or its last weights."""
    flat = {
        name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in tensors if name.startswith(UNET)
    }
    if not all(average in tensors for average in flat.values()):
        return under(tensors, UNET)
    notes.append("the moving average of the weights is read, as this family is published")
    return {name.removeprefix(UNET): tensors[average] for name, average in flat.items()}


def says_v(tensors: Tensors, state: State, notes: list[str], guessed: bool) -> bool:
    """Whether a model predicts v: by its metadata, else, of a Stable Diffusion 2, by the spread of a norm's bias."""
    said = tensors.metadata.get("modelspec.prediction_type")
    if said in ("v", "epsilon") or not guessed:
        return said == "v"
    biases = [name for name in state if name.startswith("backbone.decoder.") and name.endswith(".blocks.0.norm1.bias")]
    last = max(biases, key=lambda name: int(name.split(".")[2]))
    deviation = state[last].float().std(correction=0).item()
    kind, v = ("v", True) if deviation > V_DEVIATION else ("eps", False)
    notes.append(
        f"{kind}-prediction is guessed from {last} (deviation {deviation:.3f}): prediction.type says otherwise"
    )
    return v


def open_stage(tensors: Tensors, prefix: str, stored: Node | None, notes: list[str]) -> tuple[Node | None, State]:
    """The first stage under a prefix, if there is one, with the latents' scale that it has or its kind implies."""
    state = {name: x for name, x in under(tensors, prefix).items() if not name.startswith(tuple(IGNORED))}
    state.pop(SCALE, None)
    if not state:
        notes.append("no first stage inside: give one with --vae")
        return None, {}
    if SCALE in tensors:
        scale = tensors[SCALE]
    elif any(name.startswith("quantize.") for name in state):
        scale = torch.ones(())
    else:
        scale = torch.tensor(SD_SCALE)
        notes.append(f"the latents' scale is not in the file: Stable Diffusion's {SD_SCALE} is taken")
    return open_autoencoder(state, scale.reshape(()), torch.zeros_like(scale).reshape(()), stored)


def read_first_stage(tensors: Tensors, prefix: str) -> Checkpoint:
    """An autoencoder alone, under CompVis's names or diffusers'."""
    notes = pass_over(tensors, (prefix,))
    node, state = open_stage(tensors, prefix, stored_config(tensors).get("autoencoder"), notes)
    kind = {"kl": "KL first stage", "vq": "VQ first stage"}[node["type"] if node else "kl"]
    return Checkpoint({"format": 1, "autoencoder": node}, state, kind, [tensors.path], notes=notes)


def read_dit(tensors: Tensors) -> Checkpoint:
    """A class-conditional DiT, which comes without a first stage."""
    stored = stored_config(tensors)
    weights = {name: x for name, x in tensors.items() if name != POSITIONS}
    backbone, given, state = open_backbone(weights, "dit", {}, stored.get("backbone"))
    where, patch = str(tensors.path), backbone["patch"]
    side = check_positions(tensors[POSITIONS], where) if POSITIONS in tensors else 16
    config = stored or dit_config(backbone, given, 8 * patch * side)
    notes = ["no first stage inside: give Stable Diffusion's with --vae"]
    return Checkpoint({**config, "autoencoder": None}, state, "DiT", [tensors.path], notes=notes)


def dit_config(backbone: Node, given: Node, size: int) -> Node:
    """A DiT's published settings."""
    eps = {"type": "eps"}
    return {
        "format": 1,
        "path": {"type": "linear", "start": 1e-4, "end": 0.02},
        "prediction": {"type": "learned_range", "of": eps} if given["learned_sigma"] else eps,
        "backbone": backbone,
        "conditioner": {"type": "label", "classes": given["classes"], "null": given["classes"] - 1},
        "guidance": {"cfg": 4.0},
        "spacing": {"type": "leading", "steps": 50, "offset": 0},
        "solver": {"type": "ddpm", "noise_var": "learned" if given["learned_sigma"] else "small"},
        "autoencoder": None,
        "size": size,
    }


def check_positions(positions: Tensor, where: str) -> int:
    """The side of a DiT's grid; its table of positions must be the fixed one, for ours is computed."""
    side = round(positions.shape[-2] ** 0.5)
    fixed = sincos_positions(positions.shape[-1], side, side, positions.device)
    if fixed.shape != positions.shape or not torch.allclose(positions.float(), fixed, atol=1e-3):
        raise CheckpointError("positions that were learned", f"{where}: {POSITIONS}", expected="DiT's fixed sines")
    return side
