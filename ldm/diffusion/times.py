"""From a uniform number to a training level: which noise a sample is shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.path import Level, Path

TINY = 2.0**-32  # keeps the normal quantile of a uniform number finite


class Uniform:
    """Every time alike: continuous on a continuous path, every step alike on a table."""

    def __init__(
        self,
        *,
        shift: float = 1.0,  # above 1, towards the noise, as large images want it
    ):
        self.shift = positive("shift", shift)

    def __call__(self, path: Path, u: Tensor) -> Level:
        """The levels (B,) for uniform numbers (B,)."""
        return path.level(path.snap(shifted(u, self.shift)))


class LogitNormal:
    """The middle times more often: t = sigmoid(mean + std * n) (Esser et al. 2024, eq. 19)."""

    def __init__(
        self,
        *,
        mean: float = 0.0,  # above 0, towards the noise
        std: float = 1.0,  # how widely they are spread
        shift: float = 1.0,  # above 1, towards the noise, as large images want it
    ):
        self.mean, self.std, self.shift = mean, positive("std", std), positive("shift", shift)

    def __call__(self, path: Path, u: Tensor) -> Level:
        """The levels (B,) for uniform numbers (B,)."""
        t = torch.sigmoid(self.mean + self.std * normal_quantile(u))
        return path.level(path.snap(shifted(t, self.shift)))


class LogNormal:
    """EDM's: log(sigma / alpha) = mean + std * n (table 1)."""

    def __init__(
        self,
        *,
        mean: float = -1.2,  # of log(sigma / alpha)
        std: float = 1.2,  # and its deviation
    ):
        self.mean, self.std = mean, positive("std", std)

    def __call__(self, path: Path, u: Tensor) -> Level:
        """The levels (B,) for uniform numbers (B,)."""
        return path.trained(path.at(-(self.mean + self.std * normal_quantile(u))))


def normal_quantile(u: Tensor) -> Tensor:
    """The standard normal number below which a share u of them lies."""
    return torch.special.ndtri(u.double().clamp(TINY, 1 - TINY))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Time moved towards the noise for large images: shift * t / (1 + (shift - 1) * t) (Esser et al. 2024, eq. 23)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def positive(name: str, value: float) -> float:
    """The value, if it is above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: must be above 0, got {value}")
    return value
