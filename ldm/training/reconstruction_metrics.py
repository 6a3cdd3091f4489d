"""How well a first stage does at fixed images: distances of pairs and of sets, and a grid to look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm import pictures
from ldm.data.sampler import by_bucket, evenly_spaced
from ldm.distributed import Rank, first_process, gather, share_batches
from ldm.metrics.frechet import Moments, frechet_distance
from ldm.metrics.images import gradient_energy, measures
from ldm.scenes.pretrained import judge
from ldm.training.latent_statistics import BATCH

if TYPE_CHECKING:
    from ldm.data.loader import Data

SHOWN = 8  # rows of the grid
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels to images in [-1, 1] and what becomes of them


class ReconstructionMetrics:
    """Images spread over a source, `count` of them, the same at every validation."""

    def __init__(self, data: Data, count: int, seed: int):
        self.data, self.count, self.seed = data, min(count, len(data)), seed
        self.places = evenly_spaced(len(data), count)

    def measure(self, reconstruct: Reconstruct, lpips: nn.Module | None, file: Path, rank: Rank) -> dict[str, float]:
        """The average of each measure over the images, which the ranks share; the first draws the grid.

        The Frechet distance is that of the shipped judge's features: no download, and small numbers.
        """
        sums: dict[str, Any] = {}
        moments: list[tuple[Moments, Moments]] = []
        batches = list(by_bucket(self.places, BATCH, self.data.buckets))
        for turn, (k, counts) in enumerate(share_batches(len(batches), rank)):
            x, y = reconstruct(self.data.batch(batches[k], self.seed)["image"])
            found = measures(x, y, lpips) | {"energy": gradient_energy(y) / gradient_energy(x).clamp(min=1e-12)}
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + counts * values.double().sum()
            if counts:
                moments.append((features(x), features(y)))
            if turn == 0:
                first_process(partial(draw, x[:SHOWN], y[:SHOWN], file), rank)
        return averages(sums, self.count, rank) | {"val/frechet": distance(moments, rank)}


def features(x: Tensor) -> Moments:
    """The moments of what the judge sees in pictures."""
    return Moments.of(judge().pooled(x.float().clamp(-1, 1).cpu()))


def distance(moments: list[tuple[Moments, Moments]], rank: Rank) -> float:
    """Between all ranks' images and their reconstructions, always added up in the same order."""
    if rank.of > 1:
        parts = gather(moments, rank)
        moments = [pair for k in range(len(parts[0])) for part in parts for pair in part[k : k + 1]]
    true, made = (reduce(add, side) for side in zip(*moments))
    return frechet_distance(true, made)


def averages(sums: dict[str, Any], count: int, rank: Rank) -> dict[str, float]:
    """Sums over all ranks' images, divided by how many there are."""
    if rank.of > 1:
        parts = gather({name: float(value) for name, value in sums.items()}, rank)
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    return {f"val/{name}": float(value) / count for name, value in sums.items()}


def draw(x: Tensor, y: Tensor, file: Path) -> None:
    """Rows of input, reconstruction, and the difference of the two, where gray is none."""
    trios = torch.stack((x, y, (y - x) / 2), 1).flatten(0, 1)  # (3B, 3, H, W)
    pictures.write(pictures.grid(pictures.to_pil(trios), columns=3), file)
