"""Distributions whose denoiser is known exactly, and the paths and predictions that every test ranges over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import path, prediction
from ldm.diffusion.prediction import Prediction

PATHS = {
    "linear": path.linear(),
    "scaled_linear": path.scaled_linear(),
    "cosine": path.cosine(),
    "linear_200": path.linear(start=5e-4, end=0.1, steps=200),
    "zero_terminal_snr": path.scaled_linear(zero_terminal_snr=True),
    "vp_sde": path.VPSDE(),
    "ve": path.VE(),
    "flow": path.Flow(),
}
PREDICTIONS = {
    "eps": prediction.Eps(),
    "x0": prediction.X0(),
    "v": prediction.V(),
    "flow": prediction.Flow(),
    "edm": prediction.EDM(sigma_data=0.5),
}
PAIRS = [(p, k) for p in PATHS for k in PREDICTIONS if k != "edm" or p == "ve"]


@dataclass
class Mixture:
    """A mixture of normal distributions with diagonal covariance: weights (K,), means and variances (K, D)."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_components(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """log of weight times density of each component at x_t: (B, K)."""
        variance = alpha**2 * self.variances + sigma**2  # (K, D)
        distance = (x[:, None] - alpha * self.means) ** 2 / variance + torch.log(2 * math.pi * variance)  # (B, K, D)
        return self.weights.log() - 0.5 * distance.sum(-1)

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t]: (B, D)."""
        share = self.log_components(x, alpha, sigma).softmax(1)[..., None]  # (B, K, 1)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return (share * (self.means + gain * (x[:, None] - alpha * self.means))).sum(1)

    def only(self, component: int) -> Mixture:
        """The one component."""
        return Mixture(torch.ones_like(self.weights[:1]), *(t[component][None] for t in (self.means, self.variances)))


MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([[-1.0, 0.4], [0.8, 1.1], [0.3, -1.2]], dtype=torch.float64),
    torch.tensor([[0.10, 0.30], [0.25, 0.05], [0.5, 0.2]], dtype=torch.float64),
)


def gaussian(variance: float, mean: float = 0.0, size: int = 1) -> Mixture:
    """One normal distribution."""
    row = torch.ones(1, size, dtype=torch.float64)
    return Mixture(torch.ones(1, dtype=torch.float64), mean * row, variance * row)


class Exact:
    """The exact denoiser of a mixture, said in the terms of a kind of prediction and solved back."""

    def __init__(self, mixture: Mixture, kind: prediction.Target | None = None):
        self.mixture, self.prediction, self.calls = mixture, kind or prediction.V(), 0

    def __call__(self, x: Tensor, level, condition=None) -> Prediction:
        self.calls += 1
        x0 = self.mixture.x0(x, level.alpha, level.sigma)
        y = self.prediction.raw(Prediction(x0, (x - level.alpha * x0) / level.sigma), level)
        return self.prediction.recover(x, y, level)


def noise_of(seed: int, like: Tensor):
    """A source of N(0, I) in float64 that always tells the same sequence."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=torch.float64)


def last(steps) -> Tensor:
    """x after the last step of a solver."""
    *_, step = steps
    return step.x
