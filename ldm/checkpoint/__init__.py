"""Checkpoint files: our own format, and the formats and names of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import families
from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import shapes_of
from ldm.checkpoint.files import check_numbers, is_pickle, open_file, open_pickle
from ldm.checkpoint.formats import compvis, diffusers
from ldm.checkpoint.formats.native import is_native, read_native, save
from ldm.checkpoint.hub import local
from ldm.checkpoint.networks import build_autoencoder, load_weights
from ldm.checkpoint.rename import under
from ldm.errors import CheckpointError

__all__ = ["Checkpoint", "load_weights", "open", "save", "write_compvis", "write_diffusers"]


def open(path: str | Path, *, vae: str | Path | None = None, pickles: bool = False) -> Checkpoint:
    """Open any checkpoint; its format and family are detected. `vae` is another whose first stage replaces its own.

    A name that is not found locally and looks like an id of the Hub is downloaded. `pickles` is for `ldm convert`.
    """
    path = local(Path(path).expanduser())
    if path.is_dir():
        loaded = families.read_folder(diffusers.Folder(path))
        check_numbers(loaded.state, str(path))
    else:
        tensors = open_pickle(path) if pickles and is_pickle(path) else open_file(path)
        loaded = read_native(tensors) if is_native(tensors) else families.read_file(tensors)
        if not is_native(tensors):
            check_numbers(loaded.state, str(path))
    return loaded if vae is None else with_first_stage(loaded, open(vae, pickles=pickles))


def with_first_stage(loaded: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A checkpoint with another's first stage, which must have as many latent channels."""
    node, own = other.config.get("autoencoder"), loaded.config.get("autoencoder")
    if not node:
        raise CheckpointError("no first stage inside", str(other.files[0]), other.family, hint="a KL or VQ first stage")
    channels = build_autoencoder(own).latent_channels if own else latent_channels(loaded)
    offered = build_autoencoder(node).latent_channels
    if channels not in (None, offered):
        where, got = str(other.files[0]), f"{offered} latent channels"
        raise CheckpointError("the autoencoder has other latent channels", where, got, str(channels))
    state = {name: x for name, x in loaded.state.items() if not name.startswith("autoencoder.")}
    state |= {name: x for name, x in other.state.items() if name.startswith("autoencoder.")}
    config, notes = {**loaded.config, "autoencoder": node}, [note for note in loaded.notes if "--vae" not in note]
    return Checkpoint(config, state, loaded.family, loaded.files + other.files, loaded.tokenizer, notes + other.notes)


def latent_channels(loaded: Checkpoint) -> int | None:
    """The latent channels of a backbone; None for a plugin's, whose tensors tell us nothing."""
    weights, node = under(loaded.state, "backbone."), loaded.config.get("backbone")
    kind = families.backbone_of(node["type"]) if node else None
    if not weights or kind is None:
        return None if weights else 0
    channels: int = kind.given(shapes_of(weights), "ours")["in_channels"]
    return channels


def write_compvis(
    path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Write a single file as CompVis's and DiT's programs read it; returns notes of what it changed or left out."""
    config, notes = dict(config), list[str]()
    family = families.family_of(config)
    if family is None:
        raise CheckpointError("CompVis has no such conditioner", got=conditioner_types(config), hint="our own format")
    tensors = family.write(config, state, notes)
    compvis.write(path, tensors, config, notes, dtype)
    return notes


def write_diffusers(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write a pipeline, or a first stage alone, all or nothing; returns notes of what it changed.

    A model that reads text needs a `tokenizer` of CLIP's kind, with `ids`, `merges` and `pad`.
    """
    config, notes = dict(config), list[str]()
    family = families.family_of(config)
    if family is None:
        got = f"{(config.get('backbone') or {}).get('type')} with {conditioner_types(config)}"
        raise CheckpointError("diffusers has no such pipeline", got=got, expected="Stable Diffusion, LDM or DiT")
    diffusers.write(Path(folder), family.write_folder(config, state, tokenizer, notes), dtype)
    return notes


def conditioner_types(config: Mapping[str, Any]) -> str:
    """The types of a configuration's conditioner, in words."""
    node = config.get("conditioner") or {"type": "no conditioner"}
    return ", ".join(str(part["type"]) for part in node.get("parts", [node]))
