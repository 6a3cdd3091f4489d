"""How well a denoiser does at fixed samples, noise and levels: on the whole, and by level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ldm.data.sampler import grouped
from ldm.diffusion.times import Uniform
from ldm.draws import draw, stream
from ldm.training.reconstructions import averages
from ldm.training.statistics import BATCH, Spread, shared

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.data.loader import Data
    from ldm.training.latent_diffusion import LatentDiffusionStage

BINS = 8  # equal parts of the time from data to noise


class ByLevel:
    """The losses of the first `count` samples of a source, sample i in part i % 8 of time."""

    def __init__(self, data: Data, count: int, seed: int):
        self.data, self.count, self.seed = data, min(count, len(data)), seed
        self.batches = list(grouped(range(self.count), BATCH, data.buckets))

    def measure(self, stage: LatentDiffusionStage) -> dict[str, float]:
        """Averages over the samples, which the ranks share: over training's levels, and in each part of time."""
        sums: dict[str, Any] = {}
        spread: Spread = stage.spread
        for k, counts in shared(len(self.batches), spread):
            for name, values in self.losses(stage, stage.fetched(self.data, self.batches[k])).items():
                sums[name] = sums.get(name, 0.0) + counts * values.double().sum()
        return averages(sums, self.count, spread)

    def losses(self, stage: LatentDiffusionStage, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Each sample's, (B,): weighted and not at a level of training, and not weighted in its part of time."""
        x0 = stage.latents(batch)  # (B, C, h, w)
        condition = stage.condition(batch, x0, {})
        numbers = batch["number"]
        u, noise = draw(stream(self.seed, "validation"), numbers.tolist(), 1, x0.shape[1:])
        time = (numbers % BINS + u[:, 0]) / BINS  # (B,)
        weighted, plain = stage.losses(x0, stage.level(stage.denoiser.path, time), noise, condition)
        _, even = stage.losses(x0, Uniform()(stage.denoiser.path, time), noise, condition)
        found = {"loss": weighted, "unweighted": plain}
        for part in range(min(BINS, self.count)):
            share = len(range(part, self.count, BINS)) / self.count
            inside = stage.moved(numbers % BINS == part)
            found[f"level_{part}"] = torch.where(inside, even / share, 0)
        return found
