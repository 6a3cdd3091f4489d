"""A family in one file: a backbone alone, under names of its own, which only a table names."""

from typing import Any

import torch

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.family import Family
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.rename import above, rename, swap

PAIRS = [("weight", "toy.matrix"), ("bias", "toy.offset")]  # (ours, theirs)
PARTS = {"family": {"toy": f"{__name__}:TOY"}}


class Toy(Family):
    """A linear layer on vectors."""

    name = "Toy"

    def recognises(self, tensors: Tensors) -> bool:
        return "toy.matrix" in tensors

    def read(self, tensors: Tensors) -> Checkpoint:
        state = above(rename(tensors, swap(PAIRS)), "backbone.")
        width = state["backbone.weight"].shape[0]
        return Checkpoint({"format": 1, "backbone": {"type": "toy", "width": width}}, state, self.name, [tensors.path])

    def describes(self, config: Any) -> bool:
        return (config.get("backbone") or {}).get("type") == "toy"


TOY = Toy()
TENSORS = {"toy.matrix": torch.ones(3, 3), "toy.offset": torch.zeros(3)}
