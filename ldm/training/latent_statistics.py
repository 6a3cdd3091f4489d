"""The mean and standard deviation of latents over training images that a key fixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.distributed import Rank, share_batches, sum_over_ranks
from ldm.draws import stream

if TYPE_CHECKING:
    from ldm.data.loader import Data

MOST = 4096  # images
COST = 50  # encoding one image in so many trained ones is less than 1% of the time
BATCH = 32


def share(images: int, length: int) -> int:
    """How many images to measure after training on so many: no clock and no signal has a part in it."""
    return min(MOST, length, max(BATCH, images // COST))


def measured(
    encode: Callable[[Tensor], Tensor], data: Data, seed: int, count: int, like: Tensor, rank: Rank
) -> tuple[Tensor, Tensor]:
    """Shift and scale that normalise the latents of `count` images: one pair, or one per channel as `like` has it."""
    from ldm.data.sampler import Order

    key, size = stream(seed, "statistics"), min(BATCH, count)
    order = Order(len(data), size, key, data.buckets)
    dims = (0, 2, 3) if like.ndim else (0, 1, 2, 3)
    sums = torch.zeros(3, like.numel(), dtype=torch.float64, device=like.device)  # count, sum, sum of squares
    for k, counts in share_batches(count // size, rank):
        z = encode(data.batch(order.batch(k * size), seed)["image"])  # (B, Z, h, w)
        n = torch.full_like(sums[0], z.numel() / sums.shape[1])
        sums += counts * torch.stack((n, z.sum(dims).view(-1), z.square().sum(dims).view(-1)))
    total, first, second = sum_over_ranks(sums, rank)
    mean = first / total
    std = (second / total - mean.square()).clamp(min=0).sqrt()
    return mean, 1 / std.clamp(min=1e-8)
