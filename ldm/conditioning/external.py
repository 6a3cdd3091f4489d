"""Frozen text encoders that are too large for a checkpoint: it knows them by name and digest, and finds them again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoint import Checkpoint
from ldm.checkpoint.hub import on_hub
from ldm.conditioning.compose import Compose
from ldm.conditioning.pretrained import digest
from ldm.conditioning.text import Text
from ldm.errors import CheckpointError

LARGEST = 1_000_000_000  # bytes of an encoder that a checkpoint holds


class Encoder(NamedTuple):
    """A frozen text encoder, the key of its weights in a configuration, and the place of its tensors in a file."""

    key: str
    place: str
    text: Text


def encoders(conditioner: nn.Module | None, key: str = "conditioner", place: str = "conditioner") -> Iterator[Encoder]:
    """Those in a conditioner."""
    if isinstance(conditioner, Compose):
        for i, member in enumerate(conditioner.members):
            yield from encoders(member, f"{key}.parts.{i}", f"{place}.members.{i}")
    elif isinstance(conditioner, Text) and conditioner.frozen:
        yield Encoder(f"{key}.weights", f"{place}.transformer", conditioner)


def node_of(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The node of a configuration that a dotted key is in."""
    node: Any = config
    for name in key.split(".")[:-1]:
        node = node[int(name) if name.isdecimal() else name]
    return node


def remember(config: Mapping[str, Any], conditioner: nn.Module | None) -> dict[str, Any]:
    """A checkpoint's configuration with name and digest of each encoder that it leaves out.

    Left out is what is too large and was read by a name. A hub finds its own by it; of a place on this machine only
    the last part is kept, for people.
    """
    found: dict[str, Any] = {**copy.deepcopy(dict(config)), "left_out": {}}
    for key, _, text in encoders(conditioner):
        if text.weights is not None and size(text.transformer) > LARGEST:
            public = on_hub(text.weights)
            name = text.weights if public else Path(text.weights).name
            found["left_out"][key] = {"name": name, "sha256": digest(text.transformer)}
            if public:
                node_of(found, key)["weights"] = name
    return found


def size(module: nn.Module) -> int:
    """The bytes of a module's tensors."""
    return sum(x.numel() * x.element_size() for x in module.state_dict().values())


def whole(loaded: Checkpoint, conditioner: nn.Module) -> Checkpoint:
    """A checkpoint with the encoders that it leaves out: the conditioner's own, which has read them by name."""
    known = loaded.config.get("left_out")
    if not known:
        return loaded
    config, state = {**copy.deepcopy(loaded.config), "left_out": {}}, dict(loaded.state)
    here = {encoder.key: encoder for encoder in encoders(conditioner)}
    for key in known:
        check(key, known[key], here.get(key), str(loaded.files[0]))
        state |= {f"{here[key].place}.{name}": x for name, x in here[key].text.transformer.state_dict().items()}
        node_of(config, key)["weights"] = None
    return replace(loaded, config=config, state=state)


def check(key: str, known: Mapping[str, str], encoder: Encoder | None, where: str) -> None:
    """Refuse another encoder than the one that was left out, and none."""
    module = None if encoder is None else encoder.text.transformer
    found = "" if module is None or any(x.is_meta for x in module.parameters()) else digest(module)
    if found != known["sha256"]:
        got = f"sha256 {found[:10]}" if found else "none"
        expected = f"{known['name']}, sha256 {known['sha256'][:10]}"
        raise CheckpointError(f"{key}: not the encoder that the file leaves out", where, got, expected, f"{key}=FOLDER")
