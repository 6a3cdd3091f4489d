"""A family of published models in one file: U-Nets of pictures, whose tensors' names are ours in capitals."""

from __future__ import annotations

from typing import Any

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.family import Family
from ldm.checkpoint.files import Tensors

FIRST, LAST = "ENCODER.0.MAIN.WEIGHT", "OUT.WEIGHT"


class Capitals(Family):
    """Recognised by its first and last tensor; the number of channels is read off a shape."""

    name = "Capitals"

    def recognises(self, tensors: Tensors) -> bool:
        return {FIRST, LAST} <= tensors.keys()

    def read(self, tensors: Tensors) -> Checkpoint:
        return Checkpoint(
            config={**published(), "backbone": {**published()["backbone"], "channels": tensors[FIRST].shape[0]}},
            state={f"backbone.{name.lower()}": x for name, x in tensors.items()},
            family=self.name,
            files=[tensors.path],
        )


def published() -> dict[str, Any]:
    """What is the same in all of them."""
    return {
        "path": {"type": "flow"},
        "prediction": {"type": "flow"},
        "backbone": {"type": "unet", "multipliers": [1], "blocks": 1, "attend": [], "heads": 1},
        "guidance": {"cfg": 1},
        "spacing": {"type": "trailing", "steps": 3},
        "solver": {"type": "euler"},
        "channels": 3,
        "size": 16,
    }


CAPITALS = Capitals()
PARTS = {"family": {"capitals": f"{__name__}:CAPITALS"}}
