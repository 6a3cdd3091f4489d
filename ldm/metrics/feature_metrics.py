"""Metrics of sets of features: Frechet and kernel distance, Inception score, precision, recall, density, coverage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.draws import mix32

SUBSETS, MOST = 100, 1000  # pairs of subsets, and samples in each at most
PARTS = 10  # over which the score is averaged
NEIGHBOURS, ROWS = 5, 1024  # k; rows of distances at a time


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) of features, in float64 on the CPU; `+` joins batches or ranks."""

    count: int
    mean: Tensor
    scatter: Tensor  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (B, D)."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features: not a set of vectors; got shape {tuple(features.shape)}; expected (B, D)")
        x = features.detach().cpu().double()  # (B, D)
        mean = x.mean(0)  # (D,)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: Moments) -> Moments:
        """The moments of the union, without the cancellation of raw sums (Chan et al., 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean  # (D,)
        between = torch.outer(shift, shift) * (self.count * other.count / count)  # (D, D)
        return Moments(count, self.mean + shift * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D)."""
        if self.count < 2:
            raise ValueError(f"features: too few for a covariance; got {self.count}; expected 2 or more")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), the last trace by eigenvalues of the symmetric A^(1/2) B A^(1/2)."""
    cov_a, cov_b = a.covariance, b.covariance
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        return math.nan  # eigh would raise
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (D, D): A^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave -1e-15 between equal sets


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between two sets of features (N, D), (M, D)."""
    return frechet_distance(Moments.of(a), Moments.of(b))


def kernel_distance(a: Tensor, b: Tensor, subsets: int = SUBSETS, size: int = MOST, seed: int = 0) -> dict[str, float]:
    """KID (Binkowski et al. 2018), unbiased: squared MMD of (N, D), (M, D) by (x y / D + 1)^3, over keyed subsets."""
    size = min(size, len(a) // 2, len(b) // 2)  # subsets that are whole sets would not vary
    if size < 2:
        raise ValueError(f"features: too few for a kernel distance; got {min(len(a), len(b))}; expected 4 or more")
    found = []
    for trial in range(subsets):
        generator = torch.Generator().manual_seed(mix32(seed, trial))
        x, y = (z[torch.randperm(len(z), generator=generator)[:size]].double() for z in (a, b))
        found.append(squared_mmd(x, y))
    return spread(found)


def spread(found: list[float]) -> dict[str, float]:
    """Mean and standard deviation over subsets."""
    values = torch.tensor(found, dtype=torch.float64)
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate from two sets (N, D) of equal size."""
    count = len(x)
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))  # (N, N), the cubic kernel
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (count * (count - 1))
    return (within - 2 * xy.mean()).item()


def inception_score(logits: Tensor, parts: int = PARTS) -> dict[str, float]:
    """exp E KL(p(y|x) || p(y)) of logits (N, classes), averaged over random parts (Salimans et al. 2016)."""
    if len(logits) < parts:
        raise ValueError(f"logits: too few for {parts} parts; got {len(logits)}; expected {parts} or more")
    mixed = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))  # samples may be sorted by class
    return spread([score(logits[part].double().softmax(1)) for part in mixed.tensor_split(parts)])


def score(p: Tensor) -> float:
    """The score of class probabilities (N, classes), some of which may be 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()


def prdc(true: Tensor, made: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of (N, D) and (M, D).

    A sample's radius is its distance to its k-th nearest neighbour in its own set.
    """
    if (got := min(len(true), len(made))) <= k:
        raise ValueError(f"features: too few for {k} neighbours; got {got}; expected {k + 1} or more")
    radius_true, radius_made = radii(true, k), radii(made, k)  # (N,), (M,)
    counts = dict.fromkeys(("precision", "recall", "density", "coverage"), 0)
    for _, d in distances(made, true):  # (b, N)
        within = d < radius_true
        counts["precision"] += int(within.any(1).sum())  # made samples within a true one's radius
        counts["density"] += int(within.sum())  # true samples whose radius includes a made one
    for rows, d in distances(true, made):  # (b, M)
        counts["recall"] += int((d < radius_made).any(1).sum())  # true samples within a made one's radius
        counts["coverage"] += int((d.amin(1) < radius_true[rows]).sum())  # those whose radius includes a made one
    of = {"precision": len(made), "recall": len(true), "density": k * len(made), "coverage": len(true)}
    return {name: count / of[name] for name, count in counts.items()}  # density may exceed one


def radii(x: Tensor, k: int) -> Tensor:
    """(N,) distances of each sample to its k-th nearest neighbour."""
    return torch.cat([d.kthvalue(k + 1, 1).values for _, d in distances(x, x)])  # the first one is the sample itself


def distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the distances (N, M), by matrix products, which are accurate enough in float64."""
    middle = y.double().mean(0)  # smaller numbers, smaller rounding errors
    x, y = x.double() - middle, y.double() - middle
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, torch.cdist(x[rows], y, compute_mode="use_mm_for_euclid_dist")


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each of (N, D) to the nearest of (M, D), and its index."""
    found = [d.min(1) for _, d in distances(x, y)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
