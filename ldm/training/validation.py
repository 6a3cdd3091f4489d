"""Validation: distances of reconstructions, losses by noise level, and grids of pictures to look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm import pictures
from ldm.config import parts
from ldm.data.loader import Data
from ldm.data.sampler import by_bucket, evenly_spaced
from ldm.distributed import Rank, first_process, gather, share_batches
from ldm.metrics.feature_metrics import Moments, frechet_distance
from ldm.metrics.features import Features
from ldm.metrics.images import gradient_energy, measures

BATCH = 32
SHOWN = 8  # samples of a grid
BINS = 8  # equal parts of the time from data to noise
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels -> images in [-1, 1] and their reconstructions
Losses = Callable[[dict[str, Any], Tensor], tuple[Tensor, Tensor, Tensor]]


class ReconstructionMetrics:
    """Measures `count` images spread over a source, the same ones at every validation."""

    def __init__(self, data: Data, count: int, seed: int):
        self.data, self.count, self.seed = data, min(count, len(data)), seed
        self.batches = list(by_bucket(evenly_spaced(len(data), count), BATCH, data.buckets))
        self.features: Features = parts.find("features", "judge")()  # small, and no download

    def measure(self, reconstruct: Reconstruct, lpips: nn.Module | None, file: Path, rank: Rank) -> dict[str, float]:
        """The average of each metric over the images, which ranks share; the first rank draws the grid."""
        sums: dict[str, Any] = {}
        moments: list[tuple[Moments, Moments]] = []
        for turn, (k, counts) in enumerate(share_batches(len(self.batches), rank)):
            x, y = reconstruct(self.data.batch(self.batches[k], self.seed)["image"])
            found = measures(x, y, lpips) | {"energy": gradient_energy(y) / gradient_energy(x).clamp(min=1e-12)}
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + counts * values.double().sum()
            if counts:
                moments.append((self.moments(x), self.moments(y)))
            if turn == 0:
                first_process(partial(draw_reconstructions, x[:SHOWN], y[:SHOWN], file), rank)
        enough = self.count > 1  # a covariance needs two
        return averages(sums, self.count, rank) | ({"val/frechet": distance(moments, rank)} if enough else {})

    def moments(self, x: Tensor) -> Moments:
        """Mean and covariance of the features of pictures."""
        return Moments.of(self.features(x.float().clamp(-1, 1).cpu()).vectors)


class LossByLevel:
    """The losses of `count` samples spread over a source, sample i in part i % BINS of time."""

    def __init__(self, data: Data, count: int, seed: int):
        self.data, self.count, self.seed = data, min(count, len(data)), seed
        self.places = np.array(evenly_spaced(len(data), self.count))
        self.batches = list(by_bucket(self.places.tolist(), BATCH, data.buckets))
        bucket = self.batches[0][0].bucket
        alike = [sample_id for batch in self.batches for sample_id in batch if sample_id.bucket == bucket]
        self.shown = [alike[i] for i in evenly_spaced(len(alike), SHOWN)]

    def measure(self, losses: Losses, rank: Rank) -> dict[str, float]:
        """Averages over the samples, which ranks share: at the levels of training, and in each part of time.

        `losses(batch, part)` gives (B,) each: weighted and plain at the levels of training, and plain at even levels.
        """
        sums: dict[str, Any] = {}
        for k, counts in share_batches(len(self.batches), rank):
            batch = self.data.batch(self.batches[k], self.seed)
            part = torch.from_numpy(np.searchsorted(self.places, np.asarray(batch["number"]))) % BINS  # (B,)
            weighted, plain, even = losses(batch, part)
            found = {"loss": weighted, "unweighted": plain} | self.by_part(even, part.to(even.device))
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + counts * values.double().sum()
        return averages(sums, self.count, rank)

    def by_part(self, even: Tensor, part: Tensor) -> dict[str, Tensor]:
        """Each part's losses, scaled so that the mean over all samples is the mean of the part."""
        shares = {k: len(range(k, self.count, BINS)) / self.count for k in range(min(BINS, self.count))}
        return {f"level_{k}": torch.where(part == k, even / share, 0) for k, share in shares.items()}


def seeded_noise(like: Tensor) -> Callable[[], Tensor]:
    """Noise of `like`'s shape with a generator for each sample; sample i has seed i, as in a pipeline."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(like))]
    return lambda: torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)


def draw_pairs(x: Tensor, y: Tensor, captions: list[str], file: Path) -> None:
    """Pairs of a sample and of what is made of its condition; the PNG holds the captions."""
    pairs = torch.stack((x, y), 1).flatten(0, 1)  # (2B, 3, H, W)
    texts = {"captions": "\n".join(captions)} if captions else {}
    pictures.write(pictures.grid(pictures.to_pil(pairs), columns=4), file, texts)


def draw_reconstructions(x: Tensor, y: Tensor, file: Path) -> None:
    """Rows of an input, its reconstruction, and their difference, which is gray where there is none."""
    trios = torch.stack((x, y, (y - x) / 2), 1).flatten(0, 1)  # (3B, 3, H, W)
    pictures.write(pictures.grid(pictures.to_pil(trios), columns=3), file)


def distance(moments: list[tuple[Moments, Moments]], rank: Rank) -> float:
    """The Frechet distance between all ranks' images and reconstructions, always summed in the same order."""
    if rank.of > 1:
        by_rank = gather(moments, rank)
        moments = [pair for k in range(len(by_rank[0])) for part in by_rank for pair in part[k : k + 1]]
    true, made = (reduce(add, side) for side in zip(*moments))
    return frechet_distance(true, made)


def averages(sums: dict[str, Any], count: int, rank: Rank) -> dict[str, float]:
    """Sums over all ranks' samples, divided by the number of samples."""
    if rank.of > 1:
        by_rank = gather({name: float(value) for name, value in sums.items()}, rank)
        sums = {name: sum(part[name] for part in by_rank) for name in by_rank[0]}
    return {f"val/{name}": float(value) / count for name, value in sums.items()}
