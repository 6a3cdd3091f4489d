"""The house rules of docs/architecture.md, read off the source: arrows of import, owners of packages, sizes, names.

Every rule takes the root of a tree and yields its breaches, so that the last tests can show it a bad tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# who may import whom: everything from a lower floor; rooms on the same floor do not know each other
FLOORS = [
    {"condition"},
    {"models", "diffusion"},
    {"checkpoint"},
    {"losses"},
    {"conditioning"},
    {"assemble"},
    {"pipeline"},
    {"data"},
    {"metrics"},
    {"training"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# leaves: what they import themselves, and the lowest floor that may use them
LEAVES: dict[str, tuple[set[str], int]] = {
    "errors": (set(), 0),
    "parts": ({"errors"}, HEIGHT["assemble"]),
    "plainyaml": ({"errors"}, len(FLOORS)),
    "configfile": ({"errors", "plainyaml"}, HEIGHT["cli"]),
    "config": ({"errors", "parts", "configfile"}, HEIGHT["assemble"]),
}
OWNERS = {  # third-party package -> the only places that import it
    "omegaconf": {"configfile"},
    "yaml": {"plainyaml"},
    "lightning": {"training"},
    "pytorch_lightning": set(),
    "accelerate": {"pipeline"},
}
LAZY = {"lightning", "transformers", "open_clip", "diffusers", "torchmetrics", "torchvision", "accelerate"}
PATHS = re.compile(r"(?<![\w.])/(?:home|root|work|Users|tmp/\w)[/\w]")
HOSTS = re.compile(
    r"\b(?:pypi\.org|pythonhosted\.org|pypi\.python\.org|download\.pytorch\.org|registry\.npmjs\.org|anaconda\.org)"
)


def sources(root: Path, folder: str = "") -> Iterator[tuple[str, ast.Module]]:
    """(path in the tree, syntax tree) of each Python file."""
    for path in sorted((root / folder).rglob("*.py")):
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield str(path.relative_to(root)), ast.parse(path.read_text(encoding="utf-8"))
