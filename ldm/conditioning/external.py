"""Frozen text encoders too large for a checkpoint, which stores their name and digest instead of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.hub import on_hub
from ldm.conditioning.compose import Compose
from ldm.conditioning.pretrained import digest
from ldm.conditioning.text import Text
from ldm.errors import CheckpointError

LARGEST = 1_000_000_000  # bytes of an encoder that a checkpoint stores


class Encoder(NamedTuple):
    """A frozen text encoder with the key of its weights in the configuration and its tensors' prefix in a file."""

    key: str
    prefix: str
    text: Text


def encoders(conditioner: nn.Module | None, key: str = "conditioner", prefix: str = "conditioner") -> Iterator[Encoder]:
    """The frozen text encoders in a conditioner."""
    if isinstance(conditioner, Compose):
        for i, member in enumerate(conditioner.members):
            yield from encoders(member, f"{key}.parts.{i}", f"{prefix}.members.{i}")
    elif isinstance(conditioner, Text) and conditioner.frozen:
        yield Encoder(f"{key}.weights", f"{prefix}.transformer", conditioner)


def node_of(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The configuration node that holds a dotted key."""
    node: Any = config
    for name in key.split(".")[:-1]:
        node = node[int(name) if name.isdecimal() else name]
    found: dict[str, Any] = node
    return found


def record(config: Mapping[str, Any], conditioner: nn.Module | None) -> dict[str, Any]:
    """A checkpoint's configuration with name and digest of each encoder that it does not store.

    These are the large encoders that were loaded by name. A Hub id is kept; a local path is cut to its last part.
    """
    recorded: dict[str, Any] = {**copy.deepcopy(dict(config)), "left_out": {}}
    for key, _, text in encoders(conditioner):
        if text.weights is not None and size(text.transformer) > LARGEST:
            public = on_hub(text.weights)
            name = text.weights if public else Path(text.weights).name
            recorded["left_out"][key] = {"name": name, "sha256": digest(text.transformer)}
            if public:
                node_of(recorded, key)["weights"] = name
    return recorded


def size(module: nn.Module) -> int:
    """The bytes of a module's tensors."""
    return sum(x.numel() * x.element_size() for x in module.state_dict().values())


def restore(loaded: Checkpoint, conditioner: nn.Module) -> Checkpoint:
    """A checkpoint with the tensors of the encoders that it does not store, from a conditioner that loaded them."""
    wanted = loaded.config.get("left_out")
    if not wanted:
        return loaded
    config, state = {**copy.deepcopy(loaded.config), "left_out": {}}, dict(loaded.state)
    found = {encoder.key: encoder for encoder in encoders(conditioner)}
    for key in wanted:
        check(key, wanted[key], found.get(key), str(loaded.files[0]))
        state |= {f"{found[key].prefix}.{name}": x for name, x in found[key].text.transformer.state_dict().items()}
        node_of(config, key)["weights"] = None
    return replace(loaded, config=config, state=state)


def check(key: str, wanted: Mapping[str, str], encoder: Encoder | None, file: str) -> None:
    """Refuse a missing encoder, and one with another digest."""
    module = None if encoder is None else encoder.text.transformer
    found = "" if module is None or any(x.is_meta for x in module.parameters()) else digest(module)
    if found != wanted["sha256"]:
        got = f"sha256 {found[:10]}" if found else "none"
        expected = f"{wanted['name']}, sha256 {wanted['sha256'][:10]}"
        raise CheckpointError(f"{key}: not the encoder that the file needs", file, got, expected, f"{key}=FOLDER")
