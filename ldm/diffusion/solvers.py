"""Solvers: generators that go down a grid and yield one Step per interval.

Each solver uses the same first-order step, `ddim_step`, with its own estimate of x0. `denoise(x, row) -> Prediction`
has its condition bound; `noise()` returns N(0, I) like x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ldm.condition import at_least_float32
from ldm.diffusion.path import Level, Row, mix
from ldm.diffusion.posterior import NoiseVar, mean_weights, noise_variance, small_variance
from ldm.diffusion.prediction import Prediction

Denoise = Callable[[Tensor, Row], Prediction]
Noise = Callable[[], Tensor] | None


class Step(NamedTuple):
    """x at the next point of the grid, the normal distribution it was drawn from, and the prediction used."""

    x: Tensor
    mean: Tensor
    std: Tensor | float
    prediction: Prediction


def ddim_step(
    x: Tensor,
    prediction: Prediction,
    now: Row,
    next: Row,
    eta: float = 0.0,
    noise: Noise = None,
    noise_var: NoiseVar = "small",
    x0: Tensor | None = None,
) -> Step:
    """DDIM eq. 12: eta = 0 is deterministic, 1 is ancestral; higher orders pass their own `x0`."""
    variance = eta**2 * small_variance(now, next)
    a, b = mean_weights(now, next, variance)
    mean = mix(a, x, b, prediction.x0 if x0 is None else x0)
    if eta > 0 and noise_var != "small":
        variance = eta**2 * noise_variance(noise_var, now, next, prediction.frac)
    if prediction.shift is not None:
        if eta == 0:
            raise ValueError(
                "eta: classifier guidance with form='mean' needs a stochastic solver; try ddpm or form='score'"
            )
        mean = mean + prediction.shift * variance
    if next.sigma == 0 or eta == 0:
        return Step(mean, mean, 0.0, prediction)
    std = variance**0.5
    return Step(mean if noise is None else mean + std * noise(), mean, std, prediction)


def check(order: int = 1, eta: float = 0.0, noise_var: NoiseVar = "small", noise: Noise = None) -> None:
    """Refuse invalid settings of a solver."""
    if order not in (1, 2, 3):
        raise ValueError(f"order: unknown; got {order}; expected 1, 2 or 3")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: out of range; got {eta}; expected 0 to 1")
    if noise_var not in get_args(NoiseVar):
        raise ValueError(f"noise_var: unknown; got {noise_var}; expected {', '.join(get_args(NoiseVar))}")
    if eta > 0 and noise is None:
        raise ValueError("noise: a stochastic solver needs noise; expected a function; try eta=0")


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Level,
    noise: Noise = None,
    *,
    eta: float = 0.0,  # share of fresh noise in each step, 0 (none) to 1
    noise_var: NoiseVar = "small",  # variance of the noise: the posterior's, beta, or learned by the network
) -> Iterator[Step]:
    """DDIM (Song et al. 2021); on rectified flow with eta = 0, Euler's method."""
    check(eta=eta, noise_var=noise_var, noise=noise)
    x = at_least_float32(x)
    for now, next in pairwise(grid.rows()):
        step = ddim_step(x, denoise(x, now), now, next, eta, noise, noise_var)
        x = step.x
        yield step


euler = partial(ddim, eta=0.0)
euler_ancestral = partial(ddim, eta=1.0)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    grid: Level,
    noise: Noise = None,
    *,
    noise_var: NoiseVar = "large",  # variance of the noise: the posterior's, beta, or learned by the network
) -> Iterator[Step]:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2), with the small, the large or a learned variance."""
    return ddim(denoise, x, grid, noise, eta=1.0, noise_var=noise_var)


def _at_edge(now: Row, next: Row) -> bool:
    """True where the log-SNR is infinite, so that higher orders cannot extrapolate."""
    return now.alpha == 0 or next.sigma == 0


def heun(denoise: Denoise, x: Tensor, grid: Level, noise: Noise = None) -> Iterator[Step]:
    """Heun's method on d(x / alpha) = eps d(sigma / alpha) (EDM algorithm 1): two evaluations per step."""
    x = at_least_float32(x)
    for now, next in pairwise(grid.rows()):
        first = denoise(x, now)
        step = ddim_step(x, first, now, next)
        if not _at_edge(now, next):
            eps = torch.lerp(first.eps, denoise(step.x, next).eps, 0.5)
            step = ddim_step(x, first, now, next, x0=mix(1 / now.alpha, x, -now.sigma / now.alpha, eps))
        x = step.x
        yield step


def singlestep(denoise: Denoise, x: Tensor, grid: Level, noise: Noise = None, *, order: int) -> Iterator[Step]:
    """DPM-Solver++ 2S and 3S (Lu et al. 2022): every `order` steps of the grid form one Runge-Kutta step."""
    check(order=order)
    x = at_least_float32(x)
    for group in _groups(grid.rows(), order):
        start, start_x, x0 = group[0], x, None
        for stage, (now, next) in enumerate(pairwise(group)):
            prediction = denoise(x, now)
            if stage == 0:
                first = prediction.x0
            else:
                h = next.log_snr - start.log_snr
                weight = (0.5 if stage == 1 else _phi(h)) * h / (now.log_snr - start.log_snr)
                x0 = mix(1 - weight, first, weight, prediction.x0)
            step = ddim_step(start_x, prediction, start, next, x0=x0)
            x = step.x
            yield step


dpmpp_2s = partial(singlestep, order=2)
dpmpp_3s = partial(singlestep, order=3)


def _groups(rows: list[Row], order: int) -> Iterator[list[Row]]:
    """Runs of order + 1 points, each starting at the end of the last; an interval at an edge is a run of its own."""
    group = rows[:1]
    for now, next in pairwise(rows):
        edge = _at_edge(now, next)
        if len(group) > 1 and (edge or len(group) > order):
            yield group
            group = [now]
        group = [*group, next]
        if edge:
            yield group
            group = [next]
    if len(group) > 1:
        yield group


def _phi(h: float) -> float:
    """The weight of the slope of x0 over a step h in log-SNR: 1 / (1 - exp(-h)) - 1 / h, which tends to 1/2."""
    return -1 / math.expm1(-h) - 1 / h


def multistep(
    denoise: Denoise,
    x: Tensor,
    grid: Level,
    noise: Noise = None,
    *,
    order: int,  # order of the polynomial through the last predictions
    eta: float = 0.0,  # share of fresh noise in each step, 0 (none) to 1
) -> Iterator[Step]:
    """DPM-Solver++ 2M and 3M (Lu et al. 2022): x0 extrapolated from the last steps; eta = 1 is the SDE's solver."""
    check(order=order, eta=eta, noise=noise)
    x = at_least_float32(x)
    past: list[tuple[float, Tensor]] = []  # (log-SNR, x0), newest first
    for now, next in pairwise(grid.rows()):
        prediction = denoise(x, now)
        past = [(now.log_snr, prediction.x0), *past][:order]
        x0 = None if _at_edge(now, next) else _extrapolate(past, next.log_snr, eta)
        step = ddim_step(x, prediction, now, next, eta, noise, x0=x0)
        if now.alpha == 0:
            past = []
        x = step.x
        yield step


dpmpp_2m = partial(multistep, order=2)
dpmpp_2m_sde = partial(multistep, order=2, eta=1.0)
dpmpp_3m = partial(multistep, order=3)


def _extrapolate(past: list[tuple[float, Tensor]], log_snr: float, eta: float = 0.0) -> Tensor:
    """The x0 whose first-order step equals the step of order len(past); order 3 as published.

    The weight of the old x decays by exp(-k), with k = h for eta = 0 and 2h for eta = 1.
    """
    (now, m0), *older = past
    h = log_snr - now
    if not older:
        return m0
    r0 = (now - older[0][0]) / h
    if len(older) == 1:
        return mix(1 + 0.5 / r0, m0, -0.5 / r0, older[0][1])
    (_, m1), (_, m2) = older
    r1 = (older[0][0] - older[1][0]) / h
    k = h - 0.5 * math.log(1 - eta**2 + eta**2 * math.exp(-2 * h))
    slope = _phi(k)
    curve = ((math.expm1(-k) + k) / k**2 - 0.5) / math.expm1(-k)
    curve = (slope * r0 + curve) / (r0 + r1)
    newer, elder = (slope + curve) / r0, curve / r1
    return mix(1 + newer, m0, -newer - elder, m1).add_(m2, alpha=elder)


def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Level,
    noise: Noise = None,
    *,
    order: int = 2,  # of the predictor; the corrector's is one higher
) -> Iterator[Step]:
    """UniPC with B2 (Zhao et al. 2023): each prediction first corrects the step before, at no extra cost."""
    check(order=order)
    x, rows = at_least_float32(x), grid.rows()
    past: list[tuple[float, Tensor]] = []  # (log-SNR, x0), newest first
    last, last_x = rows[0], x  # the start of the last step
    for now, next in pairwise(rows):
        prediction = denoise(x, now)
        if past:
            x = ddim_step(last_x, prediction, last, now, x0=_unified(past, now.log_snr, prediction.x0)).x
        past = [(now.log_snr, prediction.x0), *past][:order]
        step = ddim_step(x, prediction, now, next, x0=None if _at_edge(now, next) else _unified(past, next.log_snr))
        if now.alpha == 0:
            past = []
        last, last_x, x = now, x, step.x
        yield step


def _unified(past: list[tuple[float, Tensor]], log_snr: float, current: Tensor | None = None) -> Tensor:
    """UniPC's sum over the differences of x0, eq. 3; with `current`, the corrector's."""
    (now, m0), *older = past
    h = log_snr - now
    points = [((other - now) / h, m) for other, m in older] + ([] if current is None else [(1.0, current)])
    x0 = m0
    for weight, (r, m) in zip(_unified_weights([r for r, _ in points], h), points):
        x0 = x0 + (m - m0) * (weight / r)
    return x0


def _unified_weights(ratios: list[float], h: float) -> list[float]:
    """The rho that make the sum exact for polynomials, R rho = b; 1/2 for a single point, as published."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
    for n in range(1, len(ratios) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[r**n for r in ratios] for n in range(len(ratios))], dtype=torch.float64)
    return [float(rho) for rho in torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64))]
