"""The mean and standard deviation of latents over training images that a key fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from ldm.draws import stream

if TYPE_CHECKING:
    from ldm.data.loader import Data

MOST = 4096  # images
COST = 50  # encoding one image in so many trained ones is less than 1% of the time
BATCH = 32


class Spread(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    ranks: int = 1


def shared(count: int, spread: Spread) -> Iterator[tuple[int, bool]]:
    """This rank's of so many batches, and whether it counts: sharded networks want equally many on every rank."""
    for start in range(0, count, spread.ranks):
        yield min(start + spread.rank, count - 1), start + spread.rank < count


def share(images: int, length: int) -> int:
    """How many images to measure after training on so many: no clock and no signal has a part in it."""
    return min(MOST, length, max(BATCH, images // COST))


def measured(
    encode: Callable[[Tensor], Tensor], data: Data, seed: int, count: int, like: Tensor, spread: Spread
) -> tuple[Tensor, Tensor]:
    """Shift and scale that normalise the latents of `count` images: one pair, or one per channel as `like` has it."""
    from ldm.data.sampler import Order

    key, size = stream(seed, "statistics"), min(BATCH, count)
    order = Order(len(data), size, key, data.buckets)
    dims = (0, 2, 3) if like.ndim else (0, 1, 2, 3)
    sums = torch.zeros(3, like.numel(), dtype=torch.float64, device=like.device)  # count, sum, sum of squares
    for k, counts in shared(count // size, spread):
        z = encode(data.batch(order.batch(k * size), seed)["image"])  # (B, Z, h, w)
        total = torch.full_like(sums[0], z.numel() / sums.shape[1])
        sums += counts * torch.stack((total, z.sum(dims).view(-1), z.square().sum(dims).view(-1)))
    if spread.ranks > 1:
        distributed.all_reduce(sums)
    mean = sums[1] / sums[0]
    std = (sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt()
    return mean, 1 / std.clamp(min=1e-8)
