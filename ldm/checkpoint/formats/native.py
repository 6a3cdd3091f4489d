"""Our own format: one safetensors file with the weights, the configuration, the tokenizer and a digest of it all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import __version__
from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.files import AGAIN, DIGEST, Tensors, check_digest, rounded, write_file
from ldm.checkpoint.networks import fingerprint
from ldm.errors import CheckpointError

MARK, FORMAT = "ldm", 1  # the metadata's key that tells our files, and the newest format that it may name


def save(
    path: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a checkpoint, all or nothing, and return its digest; `dtype` stores the weights in another type."""
    if dtype is not None and config.get("fingerprint") and config.get("autoencoder"):
        config = refingered(config, state, dtype)
    metadata = {MARK: str(FORMAT), "config": json.dumps(config), "version": __version__}
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer
    return write_file(path, state, metadata, dtype)


def refingered(config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Any]:
    """The configuration with the fingerprint that its own first stage has once it is rounded; another's stays."""
    own = {name: x for name, x in state.items() if name.startswith("autoencoder.")}
    if config["fingerprint"] != fingerprint(config["autoencoder"], own):
        return config
    return {**config, "fingerprint": fingerprint(config["autoencoder"], rounded(own, dtype))}


def read_native(tensors: Tensors) -> Checkpoint:
    """One of our files, each of its bytes compared with the digest."""
    where, number = str(tensors.path), tensors.metadata[MARK]
    if lost := {"config", DIGEST} - tensors.metadata.keys():
        raise CheckpointError("the metadata are incomplete", where, f"no {sorted(lost)[0]}", hint=AGAIN)
    digest = check_digest(tensors.path)
    if not number.isdecimal() or int(number) > FORMAT:
        raise CheckpointError("written by a newer version", where, f"format {number}", str(FORMAT), "a newer ldm")
    config = json.loads(tensors.metadata["config"])
    loaded = Checkpoint(config, dict(tensors), "ldm", [tensors.path], tensors.metadata.get("tokenizer"))
    loaded.hash = digest  # the file's own sha256 would be another reading of it all
    return loaded
