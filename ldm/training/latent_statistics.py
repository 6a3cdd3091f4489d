"""Mean and standard deviation of the latents of training images, chosen by a key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.data.loader import Data
from ldm.data.sampler import Order
from ldm.distributed import Rank, share_batches, sum_over_ranks
from ldm.draws import stream

MOST, BATCH = 4096, 32  # images
SHARE = 50  # one encoded image for this many trained ones costs less than 1% of the time


def sample_count(trained: int, length: int) -> int:
    """How many images to measure after training on `trained` ones; it depends on no clock and no signal."""
    return min(MOST, length, max(BATCH, trained // SHARE))


def measure(
    encode: Callable[[Tensor], Tensor], data: Data, seed: int, count: int, like: Tensor, rank: Rank
) -> tuple[Tensor, Tensor]:
    """Shift and scale that normalise the latents of `count` images: one pair, or one per channel if `like` has it."""
    size = min(BATCH, count)
    order = Order(len(data), size, stream(seed, "statistics"), data.buckets)
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
