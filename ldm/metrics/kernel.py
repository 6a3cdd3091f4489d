"""The kernel distance between two sets of features (KID, Binkowski et al. 2018), without a bias at any sample count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.draws import mix32

SUBSETS, MOST = 100, 1000  # how many pairs of subsets are compared, of at most how many samples


class Estimate(NamedTuple):
    """A mean over trials, and how far they differ."""

    mean: float
    std: float


def kernel_distance(a: Tensor, b: Tensor, subsets: int = SUBSETS, size: int = MOST, seed: int = 0) -> Estimate:
    """The squared MMD of (N, D) and (M, D) under (x y / D + 1)^3, averaged over keyed subsets."""
    size = min(size, len(a) // 2, len(b) // 2)  # a whole set in each would differ from nothing
    if size < 2:
        raise ValueError(f"features: too few for a kernel distance; got {min(len(a), len(b))}; expected 4 or more")
    found = []
    for trial in range(subsets):
        generator = torch.Generator().manual_seed(mix32(seed, trial))
        x, y = (z[torch.randperm(len(z), generator=generator)[:size]].double() for z in (a, b))
        found.append(squared_mmd(x, y))
    values = torch.tensor(found, dtype=torch.float64)
    return Estimate(values.mean().item(), values.std(correction=0).item())


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Its unbiased estimate from as many of both, (N, D)."""
    count = len(x)
    xx, yy, xy = (polynomial(a, b) for a, b in ((x, x), (y, y), (x, y)))  # (N, N)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (count * (count - 1))
    return (within - 2 * xy.mean()).item()


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """The cubic kernel, (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
