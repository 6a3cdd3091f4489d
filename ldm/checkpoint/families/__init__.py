"""The families of published models, one file each; `ldm.config.parts.FAMILIES` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.family import Backbone, Family
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.diffusers import INDEX, Folder
from ldm.config import parts
from ldm.errors import CheckpointError

UNSUPPORTED = {  # what people may take for one of ours, by the prefix of a tensor; a family of that name makes it ours
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA",
}


def families() -> list[Family]:
    """All families in the order in which they are asked: the last one that was added first."""
    return [parts.load(target) for target in reversed(parts.FAMILIES.values())]


def read_file(tensors: Tensors) -> Checkpoint:
    """A single file of any family, recognised by its names and shapes."""
    known = families()
    others = {prefix: what for prefix, what in UNSUPPORTED.items() if what not in [family.name for family in known]}
    other = next((what for name in tensors for prefix, what in others.items() if name.startswith(prefix)), "")
    for family in [] if other else known:
        if family.recognises(tensors):
            return family.read(tensors)
    got = other or f"{len(tensors)} tensors: {', '.join(sorted(tensors)[:5])}"
    expected = f"our own format, {', '.join(dict.fromkeys(family.name for family in known))}"
    raise CheckpointError("unknown architecture", str(tensors.path), got, expected)


def read_folder(folder: Folder) -> Checkpoint:
    """A folder of diffusers of any family, recognised by its parts and their settings."""
    known = families()
    for family in known:
        if family.recognises_folder(folder):
            return family.read_folder(folder)
    kind = folder.index.get("_class_name") or folder.settings().get("_class_name")
    if not folder.index:
        got, expected = kind or "neither that nor config.json", "a folder that diffusers has written"
        raise CheckpointError(f"a folder without {INDEX}", str(folder.path), got, expected)
    strange = [name for name in folder.parts if name not in folder_parts()]
    got = f"{kind} with {', '.join(strange or folder.parts)}"
    raise CheckpointError("unsupported pipeline", str(folder.path), got, "Stable Diffusion 1 or 2, LDM or DiT")


def folder_parts() -> list[str]:
    """The parts of diffusers folders that some family reads."""
    return [*dict.fromkeys(part for family in families() for part in family.parts())]


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that can write a configuration of ours in others' formats, if there is one."""
    node = config.get("backbone")
    if node and backbone_of(node["type"]) is None:
        expected = " or ".join(sorted({family.backbone.type for family in families() if family.backbone}))
        raise CheckpointError("other programs have no such backbone", got=node["type"], expected=expected)
    return next((family for family in families() if family.describes(config)), None)


def backbone_of(kind: str) -> Backbone | None:
    """The backbone of this type, if a family has it; of a plugin's we know nothing."""
    return next((f.backbone for f in families() if f.backbone is not None and f.backbone.type == kind), None)
