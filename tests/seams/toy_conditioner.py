"""Conditioners in one file: how many words a caption has, and where the picture was cropped, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.condition import Condition, Vector
from ldm.conditioning.conditioner import Conditioner


class Words(Conditioner):
    """The number of words, of which the null has none."""

    reads = ("caption",)

    def __init__(self, *, drop: float = 0.1):
        super().__init__("words", drop)
        self.vectors = {"words": Vector("numbers", 1)}
        self.gain = torch.nn.Parameter(torch.ones(()))

    def read(self, batch: Mapping[str, Any]) -> Condition:
        return self.counted([len(caption.split()) for caption in batch["caption"]])

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return self.counted([0] * count)

    def counted(self, counts: Sequence[int]) -> Condition:
        """The condition of so many words each."""
        return Condition(vectors={"words": self.gain * torch.tensor(counts, device=self.gain.device).float()})  # (B,)


class Corner(Words):
    """The corner of the crop, of which the null is outside the picture."""

    reads = ("crop",)

    def __init__(self, *, drop: float = 0.1):
        super().__init__(drop=drop)
        self.vectors = {"words": Vector("numbers", 2)}

    def read(self, batch: Mapping[str, Any]) -> Condition:
        return self.counted(batch["crop"].tolist())

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return self.counted([[-1, -1]] * count)


PARTS = {"conditioner": {name: f"{__name__}:{name.title()}" for name in ("words", "corner")}}
