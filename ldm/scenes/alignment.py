"""Whether a model paints what it is told: prompts of scenes that it never saw, and the judge's word on the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.sampler import SampleId
from ldm.scenes import captions, draw, render
from ldm.scenes.pretrained import judge
from ldm.scenes.scoring import Verdict, score
from ldm.scenes.statements import Claim

BATCH, SEED = 100, 1  # pictures read at once; of the scenes that prompts speak of


class Asked:
    """The first scenes of a split that have so many objects, or any number, as a source of pictures with captions.

    Of those held out, the captions all name what is new: not every caption of such a scene does.
    """

    buckets: NDArray | None = None
    groups: NDArray | None = None

    def __init__(
        self,
        count: int,
        objects: int | None = None,
        split: str = "validation",
        seed: int = SEED,
        resolution: int = 64,
        batch_size: int = 50,
        workers: int = 0,
    ):
        found: list[int] = []
        start, block = 0, 4 * count
        while len(found) < count:
            indices = np.arange(start, start + block)
            table = draw(seed, indices, split)
            wanted = [objects in (None, there) for there in table.there.sum(1).tolist()]
            if split == "held_out":
                texts = captions(table, seed, indices.tolist())
                wanted = [wish and Claim.read(text).held_out for wish, text in zip(wanted, texts)]
            found += indices[wanted].tolist()
            start += block
        self.table = draw(seed, found[:count], split)
        self.captions = captions(self.table, seed, found[:count])
        self.batch_size, self.workers = batch_size, workers
        self.sizes: Sequence[tuple[int, int]] = [(resolution, resolution)]  # (H, W)
        self.about = {"asked": count, "objects": objects, "split": split, "seed": seed, "resolution": resolution}

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """True renders of these with their captions."""
        rows = np.array([sample_id.index for sample_id in sample_ids])
        made = render(self.table[rows], self.sizes[0][0])
        numbers = {
            name: torch.tensor([getattr(sample_id, name) for sample_id in sample_ids]) for name in ("number", "index")
        }
        return {**numbers, "image": made["image"], "caption": [self.captions[row] for row in rows.tolist()]}


def prompts(count: int, objects: int | None = None, split: str = "validation", seed: int = SEED) -> list[str]:
    """The captions of those scenes."""
    return Asked(count, objects, split, seed).captions


@torch.no_grad()
def verdicts(x: Tensor, prompts: Sequence[str]) -> list[Verdict]:
    """Which parts of each prompt its picture shows; x (B, 3, H, W) in [-1, 1]."""
    parts = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
    return [each for part in parts for each in score(judge()(x[part]), list(map(Claim.read, prompts[part])))]
