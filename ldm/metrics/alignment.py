"""Whether a model paints what it is told: prompts of scenes that it never saw, and the judge's word on the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ldm.checkpoint.pretrained import judge
from ldm.data.scenes import captions, draw
from ldm.metrics.claims import Claim
from ldm.metrics.scenes import Verdict, score
from ldm.pictures import to_tensor

BATCH, SEED = 100, 1  # pictures read at once; of the scenes that prompts speak of


def prompts(count: int, objects: int | None = None, split: str = "validation", seed: int = SEED) -> list[str]:
    """The captions of the first scenes of a split that have so many objects, or any number."""
    found: list[str] = []
    start, block = 0, 4 * count
    while len(found) < count:
        indices = np.arange(start, start + block)
        table = draw(seed, indices, split)
        texts = captions(table, seed, indices.tolist())
        found += [text for text, n in zip(texts, table.there.sum(1)) if objects in (None, n)]
        start += block
    return found[:count]


@torch.no_grad()
def verdicts(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
    """Which parts of each prompt its picture shows."""
    found = []
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        x = torch.cat([to_tensor(image, (image.height, image.width)) for image in images[part]])
        found += score(judge()(x), [Claim.read(text) for text in prompts[part]])
    return found
