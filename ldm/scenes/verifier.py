"""Verification of captions: prompts of scenes that training never shows, and the judge's scores of pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.loader import Data
from ldm.data.sampler import SampleId
from ldm.scenes import captions, draw, render
from ldm.scenes.pretrained import judge
from ldm.scenes.scoring import Score, score_all, tally
from ldm.scenes.statements import Statement

BATCH, SEED = 100, 1  # pictures scored at a time; seed of the scenes that prompts describe
KINDS: dict[str, tuple[int | None, str]] = {  # number of objects, split
    "one object": (1, "validation"),
    "two objects": (2, "validation"),
    "three objects": (3, "validation"),
    "combinations never seen": (None, "held_out"),
}

YARDSTICKS = {"one object and two": ("one object", "two objects")}


class PromptSet:
    """The first scenes of a split with this number of objects, or any number, as pictures with captions.

    Captions of the held-out split all name what is held out; not every caption of such a scene does.
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
            chosen = [objects in (None, number) for number in table.there.sum(1).tolist()]
            if split == "held_out":
                texts = captions(table, seed, indices.tolist())
                chosen = [each and Statement.parse(text).held_out for each, text in zip(chosen, texts)]
            found += indices[chosen].tolist()
            start += block
        self.table = draw(seed, found[:count], split)
        self.captions = captions(self.table, seed, found[:count])
        self.batch_size, self.workers = batch_size, workers
        self.sizes: Sequence[tuple[int, int]] = [(resolution, resolution)]  # (H, W)

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """Renders of these scenes with their captions."""
        rows = np.array([sample_id.index for sample_id in sample_ids])
        rendered = render(self.table[rows], self.sizes[0][0])
        numbers = {
            name: torch.tensor([getattr(sample_id, name) for sample_id in sample_ids]) for name in ("number", "index")
        }
        return {**numbers, "image": rendered["image"], "caption": [self.captions[row] for row in rows.tolist()]}


class Verifier:
    """Scores pictures of scenes against their captions with the shipped judge."""

    kinds = tuple(KINDS)
    yardsticks = YARDSTICKS

    def prompts(self, kind: str, count: int, like: Data, seed: int) -> PromptSet:
        """`count` scenes of a kind, as large as the pictures of `like`."""
        return PromptSet(count, *KINDS[kind], seed, like.sizes[0][0], like.batch_size, like.workers)

    @torch.no_grad()
    def scores(self, x: Tensor, prompts: Sequence[str]) -> list[Score]:
        """Which parts of each prompt its picture shows; x (B, 3, H, W) in [-1, 1]."""
        statements = [Statement.parse(prompt) for prompt in prompts]
        parts = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
        return [score for part in parts for score in score_all(judge()(x[part]), statements[part])]

    def tally(self, scores: Sequence[Score]) -> dict[str, tuple[int, int]]:
        """(correct, total) of each part that occurs, and of `whole` pictures."""
        return {name: counts for name, counts in tally(scores).items() if counts[1]}
