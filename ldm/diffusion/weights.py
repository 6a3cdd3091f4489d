"""Weights of the loss by level: each is one of |x0 - x0_hat|^2, times (sigma / det)^2 to be one of |y - y_hat|^2."""

from __future__ import annotations

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
    """The output's own squared error."""

    def __call__(self, prediction: Target, level: Level) -> Tensor:
        """(B,)"""
        return torch.ones_like(level.alpha)


class SNR:
    """SNR = (alpha / sigma)^2 on x0, which is 1 on eps."""

    def __call__(self, prediction: Target, level: Level) -> Tensor:
        """(B,)"""
        return (level.alpha / det(prediction, level)) ** 2


class MinSNR:
    """min(SNR, gamma) on x0 (Hang et al. 2023)."""

    def __init__(
        self,
        *,
        gamma: float = 5.0,  # where the signal-to-noise ratio is cut off
    ):
        self.gamma = positive("gamma", gamma)

    def __call__(self, prediction: Target, level: Level) -> Tensor:
        """(B,), finite wherever the output can be inverted: min(alpha^2, gamma * sigma^2) / det^2."""
        return torch.minimum(level.alpha**2, self.gamma * level.sigma**2) / det(prediction, level) ** 2


class EDM:
    """(sigma^2 + d^2) / (sigma * d)^2 on x0, which is 1 on EDM's own output (EDM table 1)."""

    def __init__(self, *, sigma_data: float):
        self.sigma_data = positive("sigma_data", sigma_data)

    def __call__(self, prediction: Target, level: Level) -> Tensor:
        """(B,)"""
        d = self.sigma_data
        return (level.sigma**2 + d**2) / (d * det(prediction, level)) ** 2
