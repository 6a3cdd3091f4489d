"""Whether a model paints what it is told: prompts of scenes that it never saw, and the judge's word on the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm.checkpoint.pretrained import judge
from ldm.data.sampler import Ask
from ldm.data.scenes import captions, draw, render
from ldm.metrics.claims import Claim
from ldm.metrics.scenes import Verdict, score
from ldm.pictures import to_tensor

BATCH, SEED = 100, 1  # pictures read at once; of the scenes that prompts speak of


class Asked:
    """The first scenes of a split that have so many objects, or any number, as a source of pictures with captions."""

    buckets: NDArray | None = None
    groups: NDArray | None = None

    def __init__(
        self, count: int, objects: int | None = None, split: str = "validation", seed: int = SEED, resolution: int = 64
    ):
        found: list[int] = []
        start, block = 0, 4 * count
        while len(found) < count:
            indices = np.arange(start, start + block)
            there = draw(seed, indices, split).there.sum(1)
            found += indices[(there == objects) if objects else there > 0].tolist()
            start += block
        self.table = draw(seed, found[:count], split)
        self.captions = captions(self.table, seed, found[:count])
        self.batch_size, self.workers = 50, 0
        self.sizes: Sequence[tuple[int, int]] = [(resolution, resolution)]  # (H, W)
        self.about = {"asked": count, "objects": objects, "split": split, "seed": seed, "resolution": resolution}

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, asks: Sequence[Ask], seed: int) -> dict[str, Any]:
        """True renders of these with their captions."""
        rows = np.array([ask.index for ask in asks])
        made = render(self.table[rows], self.sizes[0][0])
        return {"image": made["image"], "caption": [self.captions[row] for row in rows.tolist()]}


def prompts(count: int, objects: int | None = None, split: str = "validation", seed: int = SEED) -> list[str]:
    """The captions of those scenes."""
    return Asked(count, objects, split, seed).captions


@torch.no_grad()
def verdicts(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
    """Which parts of each prompt its picture shows."""
    found = []
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        x = torch.cat([to_tensor(image, (image.height, image.width)) for image in images[part]])
        found += score(judge()(x), [Claim.read(text) for text in prompts[part]])
    return found
