"""How well a denoiser does at fixed samples, noise and levels: on the whole, and by level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm.data.sampler import by_bucket, evenly_spaced
from ldm.diffusion.times import Uniform
from ldm.distributed import share_batches
from ldm.draws import draw, stream
from ldm.training.latent_statistics import BATCH
from ldm.training.reconstruction_metrics import averages
from ldm.training.sample_grid import SHOWN

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.data.loader import Data
    from ldm.training.recipes.diffusion import LatentDiffusionStage

BINS = 8  # equal parts of the time from data to noise


class LossByLevel:
    """The losses of `count` samples spread over a source, the i-th of them in part i % 8 of time."""

    def __init__(self, data: Data, count: int, seed: int):
        self.data, self.count, self.seed = data, min(count, len(data)), seed
        self.places = np.array(evenly_spaced(len(data), self.count))
        self.batches = list(by_bucket(self.places.tolist(), BATCH, data.buckets))
        alike = [
            sample_id
            for sample_ids in self.batches
            for sample_id in sample_ids
            if sample_id.bucket == self.batches[0][0].bucket
        ]
        self.shown = [alike[i] for i in evenly_spaced(len(alike), SHOWN)]

    def measure(self, stage: LatentDiffusionStage) -> dict[str, float]:
        """Averages over the samples, which the ranks share: over training's levels, and in each part of time."""
        sums: dict[str, Any] = {}
        for k, counts in share_batches(len(self.batches), stage.rank):
            for name, values in self.losses(stage, stage.fetched(self.data, self.batches[k])).items():
                sums[name] = sums.get(name, 0.0) + counts * values.double().sum()
        return averages(sums, self.count, stage.rank)

    def losses(self, stage: LatentDiffusionStage, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of each sample (B,): its loss at a level of training, weighted and plain, and plain in its part of time."""
        x0 = stage.latents(batch)  # (B, C, h, w)
        condition = stage.condition(batch, x0, {})
        numbers = batch["number"]
        u, noise = draw(stream(self.seed, "validation"), numbers.tolist(), 1, x0.shape[1:])
        part = torch.from_numpy(np.searchsorted(self.places, np.asarray(numbers))) % BINS  # (B,)
        time = (part + u[:, 0]) / BINS  # (B,)
        weighted, plain = stage.losses(x0, stage.level(stage.denoiser.path, time), noise, condition)
        _, even = stage.losses(x0, Uniform()(stage.denoiser.path, time), noise, condition)
        found = {"loss": weighted, "unweighted": plain}
        for k in range(min(BINS, self.count)):
            share = len(range(k, self.count, BINS)) / self.count  # so that a mean over all samples is that of the part
            inside = stage.to_device(part == k)
            found[f"level_{k}"] = torch.where(inside, even / share, 0)
        return found
