"""q(x_s | x_t, x0) for a step from t to the less noisy s: its mean, and the variances that a sampler may use."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ldm.diffusion.path import Level, Row, Scalar

NoiseVar = Literal["small", "large", "learned"]


def small_variance(now: Level | Row, next: Level | Row) -> Any:
    """The posterior's own variance, DDPM's beta-tilde (eq. 7)."""
    return next.sigma**2 * (1 - (now.alpha * next.sigma / (next.alpha * now.sigma)) ** 2)


def large_variance(now: Level | Row, next: Level | Row) -> Any:
    """The variance of x_t given x_s, DDPM's beta."""
    return now.sigma**2 - (now.alpha * next.sigma / next.alpha) ** 2


def mean_weights(now: Level | Row, next: Level | Row, variance: Scalar) -> Any:
    """(a, b) of the mean a * x_t + b * x0 when `variance` out of sigma_s^2 is fresh noise (DDIM eq. 12)."""
    a = (next.sigma**2 - variance) ** 0.5 / now.sigma
    return a, next.alpha - a * now.alpha


def noise_variance(kind: NoiseVar, now: Row, next: Row, frac: Tensor | None) -> Any:
    """The variance of an ancestral step: small, large, or learned as a point between the two on a log scale."""
    small, large = small_variance(now, next), large_variance(now, next)
    if kind == "learned" and next.sigma == 0:
        return 0.0  # the small variance is 0 there, and has no logarithm
    if kind == "learned":
        if frac is None:
            raise ValueError("noise_var: learned needs a model that predicts its variance; expected small or large")
        return (small ** (1 - frac)) * large**frac
    return small if kind == "small" else large
