"""From uniform numbers u (B,) to the noise levels (B,) at which samples are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.path import Level, Path

TINY = 2.0**-32  # keeps the normal quantile of a uniform number finite


@dataclass(kw_only=True, frozen=True)
class Uniform:
    """Uniform times: continuous on a continuous path, steps on a table."""

    shift: float = 1.0  # above 1, more noise, for large images

    def __post_init__(self) -> None:
        positive("shift", self.shift)

    def __call__(self, path: Path, u: Tensor) -> Level:
        return path.level(path.snap(shifted(u, self.shift)))


@dataclass(kw_only=True, frozen=True)
class LogitNormal:
    """Middle times are more frequent: t = sigmoid(mean + std * n) (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0  # above 0, more noise
    std: float = 1.0  # the spread
    shift: float = 1.0  # above 1, more noise, for large images

    def __post_init__(self) -> None:
        positive("std", self.std)
        positive("shift", self.shift)

    def __call__(self, path: Path, u: Tensor) -> Level:
        t = torch.sigmoid(self.mean + self.std * normal_quantile(u))
        return path.level(path.snap(shifted(t, self.shift)))


@dataclass(kw_only=True, frozen=True)
class LogNormal:
    """EDM's distribution: log(sigma / alpha) = mean + std * n (table 1)."""

    mean: float = -1.2  # of log(sigma / alpha)
    std: float = 1.2  # standard deviation of the same

    def __post_init__(self) -> None:
        positive("std", self.std)

    def __call__(self, path: Path, u: Tensor) -> Level:
        return path.trained(path.at(-(self.mean + self.std * normal_quantile(u))))


def normal_quantile(u: Tensor) -> Tensor:
    """The standard normal quantile of u."""
    quantile: Tensor = torch.special.ndtri(u.double().clamp(TINY, 1 - TINY))
    return quantile


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times towards the noise for large images: shift * t / (1 + (shift - 1) * t) (Esser et al. 2024, eq. 23)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def positive(name: str, value: float) -> None:
    """Refuse a value that is not above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: must be above 0, got {value}")
