"""The variational bound on -log p(x0) of a discrete process: L_T + sum of L_t + L_0 (DDPM eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.path import Level, Prediction, Table, expand
from ldm.diffusion.posterior import NoiseVar, large_variance, mean_weights, small_variance


def term(
    prediction: Prediction, x0: Tensor, path: Table, now: Level, noise_var: NoiseVar, bins: int | None = 256
) -> Tensor:
    """L_t in bits per dimension: KL(q(x_s | x_t, x0) || p(x_s | x_t)), and -log p(x0 | x_1) at step 0. (B,)"""
    if noise_var not in get_args(NoiseVar):
        raise ValueError(f"noise_var: unknown; got {noise_var}; expected {', '.join(get_args(NoiseVar))}")
    next = path.level(now.t / path.steps)  # now.t counts from 0, so this is the next step down
    first = now.t == 0
    # the posterior of step 0 has no width: step 1's replaces it and the large variance there, as published
    floor = small_variance(path.level(now.t * 0 + 2 / path.steps), path.level(now.t * 0 + 1 / path.steps))
    small = torch.where(first, floor, small_variance(now, next))
    if noise_var == "learned":
        if prediction.frac is None:
            raise ValueError("noise_var: learned needs a model that predicts its variance; expected small or large")
        most, least = (expand(variance.log(), prediction.frac) for variance in (large_variance(now, next), small))
        log_var = prediction.frac * most + (1 - prediction.frac) * least  # Improved DDPM eq. 15
    else:
        variance = torch.where(first, floor, large_variance(now, next)) if noise_var == "large" else small
        log_var = expand(variance.log(), x0).expand_as(x0)
    _, weight = mean_weights(now, next, small_variance(now, next))
    distance = expand(weight, x0) * (x0 - prediction.x0)  # between the two means
    kl = gaussian_kl(distance, expand(small.log(), x0), log_var)
    last = expand(first, x0).bool()
    nll = decoder_nll(x0, torch.where(last, prediction.x0, x0), log_var, bins)  # far from x0 its gradient overflows
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2)


def gaussian_kl(distance: Tensor, log_var: Tensor, log_var_model: Tensor) -> Tensor:
    """KL between two normal distributions whose means are `distance` apart, in nats."""
    return 0.5 * (log_var_model - log_var - 1 + (log_var - log_var_model).exp() + distance**2 * (-log_var_model).exp())


def decoder_nll(x0: Tensor, mean: Tensor, log_var: Tensor, bins: int | None) -> Tensor:
    """-log p(x0 | x_1) in nats, of one of `bins` equal cells of [-1, 1] (DDPM eq. 13), or of a density if None."""
    if bins is None:
        return 0.5 * (math.log(2 * math.pi) + log_var + (x0 - mean) ** 2 * (-log_var).exp())
    half, inv_std = 1 / (bins - 1), (-0.5 * log_var).exp()
    upper = torch.special.log_ndtr((x0 - mean + half) * inv_std)
    lower = torch.special.log_ndtr((x0 - mean - half) * inv_std)
    upper_tail = torch.special.log_ndtr(-(x0 - mean - half) * inv_std)
    lower_tail = torch.special.log_ndtr(-(x0 - mean + half) * inv_std)
    # take the log of the difference on the side where both are small
    inside = torch.where(x0 < mean, _log_minus(upper, lower), _log_minus(upper_tail, lower_tail))
    inside = torch.where(x0 < -1 + half, upper, inside)  # the outermost cells extend to infinity
    return -torch.where(x0 > 1 - half, upper_tail, inside)


def _log_minus(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)) for a > b."""
    return a + torch.log(-torch.expm1((b - a).clamp(max=-1e-30)))


class Bound(NamedTuple):
    """The bound in bits per dimension and its terms: (B,) each, and (T, B) for `steps`, from L_0 up."""

    total: Tensor
    prior: Tensor
    steps: Tensor


@torch.no_grad()
def bits_per_dim(
    denoiser: Any,  # a Denoiser
    x0: Tensor,
    noise: Callable[[], Tensor],
    condition: Condition | None = None,
    noise_var: NoiseVar = "large",
    bins: int | None = 256,
) -> Bound:
    """The full bound for x0 in [-1, 1], with one network evaluation per step; `noise()` returns N(0, I) like x0."""
    path = denoiser.path
    if not isinstance(path, Table):
        raise ValueError("path: the bound needs a table of betas; try path.type=linear")
    times = torch.arange(1, path.steps + 1, dtype=torch.float64, device=x0.device) / path.steps
    steps = []
    for t in times:
        now = path.level(t.expand(len(x0)))
        x = expand(now.alpha, x0) * x0 + expand(now.sigma, x0) * noise()
        steps.append(term(denoiser(x, now, condition), x0, path, now, noise_var, bins))
    variance = expand(now.sigma**2, x0)
    prior = gaussian_kl(expand(now.alpha, x0) * x0, variance.log(), torch.zeros_like(variance))
    prior = prior.flatten(1).mean(1) / math.log(2)
    return Bound(prior + sum(steps), prior, torch.stack(steps))
