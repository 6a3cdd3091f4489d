"""Loss weights by level: each weights |x0 - x0_hat|^2, times (sigma / det)^2 to weight |y - y_hat|^2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.path import Level
from ldm.diffusion.prediction import Target
from ldm.diffusion.times import positive


def det(prediction: Target, level: Level) -> Tensor:
    """alpha * q - sigma * p: |x0 - x0_hat| = sigma / |det| * |y - y_hat|."""
    p, q = prediction.row(level)
    return level.alpha * q - level.sigma * p


class Constant:
    """1 on the network's output."""

    def __call__(self, prediction: Target, level: Level) -> Tensor:  # (B,)
        return torch.ones_like(level.alpha)


class SNR:
    """SNR = (alpha / sigma)^2 on x0, which is 1 on eps."""

    def __call__(self, prediction: Target, level: Level) -> Tensor:  # (B,)
        return (level.alpha / det(prediction, level)) ** 2


@dataclass(kw_only=True, frozen=True)
class MinSNR:
    """min(SNR, gamma) on x0 (Hang et al. 2023)."""

    gamma: float = 5.0  # the largest signal-to-noise ratio

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)

    def __call__(self, prediction: Target, level: Level) -> Tensor:
        """(B,), finite wherever the output can be inverted: min(alpha^2, gamma * sigma^2) / det^2."""
        return torch.minimum(level.alpha**2, self.gamma * level.sigma**2) / det(prediction, level) ** 2


@dataclass(kw_only=True, frozen=True)
class EDM:
    """(sigma^2 + d^2) / (sigma * d)^2 on x0, which is 1 on EDM's own output (EDM table 1)."""

    sigma_data: float

    def __call__(self, prediction: Target, level: Level) -> Tensor:  # (B,)
        d = self.sigma_data
        return (level.sigma**2 + d**2) / (d * det(prediction, level)) ** 2
