"""The Frechet distance between two sets of features, by their means and covariances (Heusel et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
