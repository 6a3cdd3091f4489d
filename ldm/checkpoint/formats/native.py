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
from ldm.checkpoint.networks import check_sizes, fingerprint
from ldm.errors import CheckpointError

MARK, FORMAT = "ldm", 1  # the metadata's key that identifies our files, and the newest format that we read


def save(
    path: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a checkpoint, all or nothing, and return its digest; `dtype` stores the weights in another type."""
    if dtype is not None and config.get("fingerprint") and config.get("autoencoder"):
        config = with_fingerprint(config, state, dtype)
    metadata = {MARK: str(FORMAT), "config": json.dumps(config), "version": __version__}
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer
    return write_file(path, state, metadata, dtype)


def with_fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Any]:
    """The configuration with the fingerprint of its first stage after rounding; another first stage's stays."""
    own = {name: x for name, x in state.items() if name.startswith("autoencoder.")}
    if config["fingerprint"] != fingerprint(config["autoencoder"], own):
        return config
    return {**config, "fingerprint": fingerprint(config["autoencoder"], rounded(own, dtype))}


def is_native(tensors: Tensors) -> bool:
    """True if we wrote the file in our own format."""
    return MARK in tensors.metadata


def read_native(tensors: Tensors) -> Checkpoint:
    """One of our files; every byte is compared with the digest."""
    where, number = str(tensors.path), tensors.metadata[MARK]
    if missing := {"config", DIGEST} - tensors.metadata.keys():
        raise CheckpointError("incomplete metadata", where, f"no {min(missing)}", hint=AGAIN)
    digest = check_digest(tensors.path, tensors)
    if not number.isdecimal() or int(number) > FORMAT:
        raise CheckpointError("written by a newer version", where, f"format {number}", str(FORMAT), "a newer ldm")
    config = json.loads(tensors.metadata["config"])
    check_sizes(config, tensors.shapes, where)
    loaded = Checkpoint(config, dict(tensors), "ldm", [tensors.path], tensors.metadata.get("tokenizer"))
    loaded.hash = digest  # without reading the file again
    return loaded
