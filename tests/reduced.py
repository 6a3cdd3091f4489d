"""The shipped configurations of second stages, and the overrides that make them small."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import files

ROOT = Path(__file__).parent.parent / "configs"
FILES = {file.stem: file for file in sorted((ROOT / "ldm").glob("*.yaml"))}
SMALL = {  # what makes a part small, by its type
    "unet": {"channels": 32, "blocks": 1, "depth": 1, "checkpointing": False},
    "dit": {"width": 48, "depth": 2, "heads": 4},
    "clip": {"width": 32, "layers": 1, "heads": 2, "weights": "random"},
    "open_clip": {"width": 32, "layers": 2, "heads": 2, "weights": "random"},
    "joint_text": {"width": 32, "layers": 1, "heads": 2, "head_width": 16, "vocabulary": 560},
    "label": {"width": 32},
    "layout": {"width": 32},
}
LEFT = {"depth", "checkpointing", "head_width", "vocabulary", "width"}  # only where the configuration says them


def written(name: str) -> dict[str, Any]:
    """A configuration as its file says it, read as the package reads it: YAML 1.1 takes 1e-3 for a word."""
    return files.read(FILES[name], []).values


def stage_of(name: str) -> str:
    """The first stage that a configuration's default path names, if it has one."""
    path = written(name).get("autoencoder")
    return re.fullmatch(r"runs/(\w+)/model.safetensors", path)[1] if path else ""


def reads_images(name: str) -> bool:
    """Whether its data are pictures that a user brings."""
    return written(name)["data"]["type"] == "images"


def small(name: str) -> dict[str, Any]:
    """What to change of the networks."""
    changes: dict[str, Any] = {}
    for axis, node in written(name).items():
        if axis in ("backbone", "conditioner"):
            wanted = SMALL.get(node["type"], {})
            changes |= {f"{axis}.{key}": x for key, x in wanted.items() if key in node or key not in LEFT}
    if "head_width" in written(name)["backbone"]:
        changes["backbone.head_width"] = 16
    return changes


def words(changes: Mapping[str, Any]) -> list[str]:
    """Overrides as a command line has them."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]
