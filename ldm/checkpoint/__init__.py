"""Checkpoint files: our own format, and the names that others gave the same weights."""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import under
from ldm.checkpoint.files import check_numbers, is_pickle, open_file, open_pickle
from ldm.checkpoint.formats.compvis import read_single
from ldm.checkpoint.formats.compvis_writer import write_compvis
from ldm.checkpoint.formats.diffusers import read_folder
from ldm.checkpoint.formats.diffusers_writer import write_diffusers
from ldm.checkpoint.formats.native import MARK, read_native, save
from ldm.checkpoint.hub import local
from ldm.checkpoint.networks import BACKBONES, build_autoencoder, load_weights, supplied
from ldm.errors import CheckpointError

__all__ = ["Opened", "load_weights", "open", "save", "write_compvis", "write_diffusers"]


def open(path: str | Path, *, vae: str | Path | None = None, pickles: bool = False) -> Checkpoint:
    """Any checkpoint, its kind found out by looking; `vae` is another whose first stage takes its own's place.

    What is not here and looks like a hub's id is brought from there. `pickles` is for `ldm convert` alone.
    """
    path, ours = local(Path(path).expanduser()), False
    if path.is_dir():
        loaded = read_folder(path)
    else:
        tensors = open_pickle(path) if pickles and is_pickle(path) else open_file(path)
        ours = MARK in tensors.metadata
        loaded = read_native(tensors) if ours else read_single(tensors)
    check_numbers(loaded.state, str(path), whole=ours)
    return loaded if vae is None else with_stage(loaded, open(vae, pickles=pickles))


def with_stage(loaded: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A checkpoint with another's first stage, which must give latents of as many channels."""
    node, own = other.config.get("autoencoder"), loaded.config.get("autoencoder")
    if not node:
        raise CheckpointError("no first stage inside", str(other.files[0]), other.family, hint="a KL or VQ first stage")
    latent = build_autoencoder(own).latent_channels if own else latents(loaded)
    offered = build_autoencoder(node).latent_channels
    if latent not in (None, offered):
        where, got = str(other.files[0]), f"{offered} latent channels"
        raise CheckpointError("another model's first stage", where, got, str(latent))
    state = {name: x for name, x in loaded.state.items() if not name.startswith("autoencoder.")}
    state |= {name: x for name, x in other.state.items() if name.startswith("autoencoder.")}
    config, notes = {**loaded.config, "autoencoder": node}, [note for note in loaded.notes if "--vae" not in note]
    return Checkpoint(config, state, loaded.family, loaded.files + other.files, loaded.tokenizer, notes + other.notes)


def latents(loaded: Checkpoint) -> int | None:
    """The latent channels that a backbone reads and writes; of one that is a user's own, only its author knows."""
    weights, node = under(loaded.state, "backbone."), loaded.config["backbone"]
    if weights and node["type"] not in BACKBONES:
        return None
    return supplied(node, weights)["in_channels"] if weights else 0
