"""Noise paths: x_t = alpha * x0 + sigma * eps for t in [0, 1], where 0 is the data and 1 the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.condition import at_least_float32

Scalar = Tensor | float


class Level(NamedTuple):
    """A noise level: alpha and sigma, the scale c_in of the network's input, and t as the network receives it.

    In training each field is (B,). A grid is a Level with N + 1 rows.
    """

    alpha: Tensor
    sigma: Tensor
    c_in: Tensor
    t: Tensor

    @property
    def log_snr(self) -> Tensor:
        """lambda = log(alpha / sigma): -inf at alpha = 0, +inf at sigma = 0."""
        return self.alpha.log() - self.sigma.log()

    def map(self, function: Callable[[Tensor], Tensor]) -> Level:
        """Apply a function (a move, a cast, an index) to each field."""
        return Level(*(function(field) for field in self))

    def rows(self) -> list[Row]:
        """One Row per level, from which a solver computes its coefficients without touching a device."""
        return [Row(*values) for values in zip(*(field.tolist() for field in self))]


class Row(NamedTuple):
    """One level of a grid as floats, shared by the whole batch."""

    alpha: float
    sigma: float
    c_in: float
    t: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma): -inf at alpha = 0, +inf at sigma = 0."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


class Prediction(NamedTuple):
    """A denoiser's estimate of x0 and eps in x = alpha * x0 + sigma * eps."""

    x0: Tensor
    eps: Tensor
    frac: Tensor | None = None  # position of a learned log-variance: 0 = small, 1 = large (Improved DDPM eq. 15)
    shift: Tensor | None = None  # added to a stochastic step's mean, times its variance


def expand(value: Tensor, x: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1), in the rank, type and device of x."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1))


def mix(a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """a * x + b * y; with floats, a term that is zero costs nothing."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (expand(torch.as_tensor(value, device=x.device), x) for value in (a, b))
        return a * x + b * y
    if a == 0:
        return y if b == 1 else y * b
    return torch.add(x if a == 1 else x * a, y, alpha=b)


class Path:
    """The interface of a noise path."""

    t_min = 0.0  # the least noisy time that is trained, and the last of a spacing before the data
    t_max = 1.0  # the noisiest time at which the log-SNR is finite
    sigma_data = 1.0  # the scale of the data, for EDM's preconditioning

    def level(self, t: Tensor) -> Level:
        """The level at each time."""
        raise NotImplementedError

    def at(self, log_snr: Tensor) -> Level:
        """The level at each log-SNR."""
        raise NotImplementedError

    def time(self, clock: Tensor) -> Tensor:
        """t in [0, 1] from the time as the network receives it."""
        raise NotImplementedError

    def data(self) -> Level:
        """The last row of a grid: alpha = 1 and sigma = 0, where no network is evaluated."""
        last = self.level(torch.tensor([self.t_min], dtype=torch.float64))
        return last._replace(alpha=torch.ones_like(last.alpha), sigma=torch.zeros_like(last.sigma))

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time to t, at most 1, at which the network is trained."""
        return t.clamp(self.t_min, 1.0)

    def trained(self, level: Level) -> Level:
        """The nearest level at which the network is trained."""
        return level

    def prior(self, z: Tensor) -> Tensor:
        """The start of sampling from z ~ N(0, I), never in half precision."""
        return at_least_float32(z)


class Table(Path):
    """Variance preserving by a table of betas (DDPM eq. 4): step k has abar = prod(1 - beta), and t = (k + 1) / T."""

    def __init__(
        self,
        *,
        betas: list[float],  # of the first step and so on
        zero_terminal_snr: bool = False,  # stretch the table to end in pure noise (Lin et al. 2023)
    ):
        beta = torch.as_tensor(betas, dtype=torch.float64)
        if beta.numel() < 2 or not ((beta > 0) & (beta < 1)).all():
            raise ValueError("betas: must be at least two numbers between 0 and 1")
        alpha = (1 - beta).cumprod(0).sqrt()
        if zero_terminal_snr:  # Lin et al. 2023, algorithm 1: the last alpha becomes 0, the first stays
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), alpha])  # (T + 1,) row 0 is the data
        self.sigma = (1 - self.alpha**2).sqrt()
        self.log_snr = self.alpha.log() - self.sigma.log()
        self.steps = len(beta)
        self.columns: dict[torch.device, list[Tensor]] = {}  # alpha, sigma and log-SNR by device
        self.t_min = 1 / self.steps
        self.t_max = 1 - zero_terminal_snr / self.steps

    def level(self, t: Tensor) -> Level:
        """Exact at the integer steps; between two of them the log-SNR is interpolated."""
        position = (t.double() * self.steps).clamp(0, self.steps)
        if t.device not in self.columns:  # copied once, because a copy waits for the device
            self.columns[t.device] = [column.to(t.device) for column in (self.alpha, self.sigma, self.log_snr)]
        alphas, sigmas, log_snrs = self.columns[t.device]
        nearest, low, high = (index.long() for index in (position.round(), position.floor(), position.ceil()))
        exact = (position - nearest).abs() < 1e-3  # a whole number in float32
        log_snr = torch.lerp(log_snrs[low], log_snrs[high], position - low)
        beside_end = ~(log_snrs[low].isfinite() & log_snrs[high].isfinite())  # only in a table with zero terminal SNR
        straight = torch.lerp(alphas[low], alphas[high], position - low)
        alpha = torch.where(exact, alphas[nearest], torch.where(beside_end, straight, _vp_alpha(log_snr)))
        between = torch.where(beside_end, (1 - straight**2).sqrt(), _vp_alpha(-log_snr))
        sigma = torch.where(exact, sigmas[nearest], between)
        clock = torch.where(exact, nearest, position) - 1
        return Level(alpha, sigma, torch.ones_like(alpha), clock.clamp(min=0).to(alpha))

    def at(self, log_snr: Tensor) -> Level:
        """The level at a log-SNR; the network receives a step between two of the table's."""
        known = self.log_snr[1:]  # (T,) falling
        known = known[known.isfinite()].flip(0).to(log_snr)
        high = torch.searchsorted(known, log_snr.contiguous()).clamp(1, len(known) - 1)
        fraction = (log_snr - known[high - 1]) / (known[high] - known[high - 1])
        clock = (len(known) - high - fraction).clamp(0, self.steps - 1)
        return Level(_vp_alpha(log_snr), _vp_alpha(-log_snr), torch.ones_like(log_snr), clock)

    def time(self, clock: Tensor) -> Tensor:
        """t = (k + 1) / T."""
        return (clock + 1) / self.steps

    def snap(self, t: Tensor) -> Tensor:
        """Step k for all t in (k / T, (k + 1) / T]."""
        return (t * self.steps - 1e-9).ceil().clamp(1, self.steps) / self.steps

    def trained(self, level: Level) -> Level:
        """The nearest step to a level between two."""
        return self.level(self.time(level.t.round()))


def _vp_alpha(log_snr: Tensor) -> Tensor:
    """alpha of lambda where alpha^2 + sigma^2 = 1; sigma is the same function of -lambda."""
    return torch.sigmoid(2 * log_snr).sqrt()


def linear(
    *,
    start: float = 1e-4,  # the first beta
    end: float = 0.02,  # the last
    steps: int = 1000,  # of the table
    zero_terminal_snr: bool = False,  # stretch the table to end in pure noise (Lin et al. 2023)
) -> Table:
    """DDPM's betas, equally spaced."""
    return Table(betas=_spaced(start, end, steps).tolist(), zero_terminal_snr=zero_terminal_snr)


def scaled_linear(
    *,
    start: float = 0.00085,  # the first beta
    end: float = 0.012,  # the last
    steps: int = 1000,  # of the table
    zero_terminal_snr: bool = False,  # stretch the table to end in pure noise (Lin et al. 2023)
) -> Table:
    """Latent diffusion's betas, equally spaced in their square roots."""
    return Table(betas=_spaced(start, end, steps, power=0.5).tolist(), zero_terminal_snr=zero_terminal_snr)


def cosine(
    *,
    steps: int = 1000,  # of the table
    offset: float = 0.008,  # keeps the first betas from being too small
    max_beta: float = 0.999,  # no beta is larger
) -> Table:
    """Improved DDPM eq. 17: abar = cos^2, betas capped near the end."""
    if steps < 2:
        raise ValueError(f"steps: must be at least 2, got {steps}")
    if offset < 0:
        raise ValueError(f"offset: must be at least 0, got {offset}")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta: must lie between 0 and 1, got {max_beta}")
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return Table(betas=(1 - abar[1:] / abar[:-1]).clamp(max=max_beta).tolist())


def _spaced(start: float, end: float, steps: int, power: float = 1.0) -> Tensor:
    """Numbers from start to end, equally spaced after raising to a power."""
    if steps < 2:
        raise ValueError(f"steps: must be at least 2, got {steps}")
    if not 0 < start < end < 1:
        raise ValueError(f"start: must lie below end, both between 0 and 1, got {start} and {end}")
    return torch.linspace(start**power, end**power, steps, dtype=torch.float64) ** (1 / power)


@dataclass(kw_only=True, eq=False)
class VPSDE(Path):
    """The continuous variance preserving SDE (Song et al. 2021, eq. 33), beta from beta_min to beta_max."""

    clock_scale = 999.0  # the time scale of the published continuous networks
    t_min = 1e-3

    beta_min: float = 0.1  # at the data
    beta_max: float = 20.0  # at the noise

    def __post_init__(self) -> None:
        low, high = self.beta_min, self.beta_max
        if not 0 < low <= high:
            raise ValueError(f"beta_min: must be above 0 and at most beta_max, got {low} and {high}")
        self.linear, self.quadratic = low / 2, (high - low) / 4

    def level(self, t: Tensor) -> Level:
        """-log alpha is a quadratic in t."""
        log_alpha = -(self.quadratic * t + self.linear) * t
        return Level(log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt(), torch.ones_like(t), self.clock_scale * t)

    def at(self, log_snr: Tensor) -> Level:
        """The quadratic's root, in the form that does not cancel near t = 0."""
        c = 0.5 * torch.nn.functional.softplus(-2 * log_snr)  # -log alpha
        t = 2 * c / (self.linear + (self.linear**2 + 4 * self.quadratic * c).sqrt())
        return Level(_vp_alpha(log_snr), _vp_alpha(-log_snr), torch.ones_like(t), self.clock_scale * t)

    def time(self, clock: Tensor) -> Tensor:
        """t = clock / 999."""
        return clock / self.clock_scale


@dataclass(kw_only=True, eq=False)
class VE(Path):
    """Variance exploding: alpha = 1, sigma geometric in t; the network's input and clock are EDM's (table 1)."""

    sigma_min: float = 0.002  # sigma at t = 0
    sigma_max: float = 80.0  # sigma at t = 1
    sigma_data: float = 0.5  # standard deviation of the data, which scales the input

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            got = f"{self.sigma_min} and {self.sigma_max}"
            raise ValueError(f"sigma_min: must lie between 0 and sigma_max, got {got}")
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data: must be above 0, got {self.sigma_data}")

    def level(self, t: Tensor) -> Level:
        """sigma = sigma_min^(1 - t) * sigma_max^t."""
        return self._at_sigma(self.sigma_min * (self.sigma_max / self.sigma_min) ** t)

    def at(self, log_snr: Tensor) -> Level:
        """sigma = exp(-lambda)."""
        return self._at_sigma((-log_snr).exp())

    def _at_sigma(self, sigma: Tensor) -> Level:
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        return Level(torch.ones_like(sigma), sigma, c_in, sigma.log() / 4)

    def time(self, clock: Tensor) -> Tensor:
        """The network receives c_noise = log(sigma) / 4."""
        return (4 * clock - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def prior(self, z: Tensor) -> Tensor:
        """Noise of standard deviation sigma_max."""
        return super().prior(z) * self.sigma_max


@dataclass(kw_only=True, eq=False)
class Flow(Path):
    """Rectified flow: a straight line from data to noise, alpha = 1 - t and sigma = t; the network gets 1000 t."""

    last: float = 1.0  # sigma at t = 1; below 1, an eps-prediction can be inverted there

    def __post_init__(self) -> None:
        if not 1e-3 < self.last <= 1:
            raise ValueError(f"last: must lie between 0.001 and 1, got {self.last}")
        self.t_min, self.t_max = 1e-3 / self.last, min(1.0, 0.999 / self.last)

    def level(self, t: Tensor) -> Level:
        """alpha = 1 - sigma and sigma = last * t."""
        sigma = self.last * t
        return Level(1 - sigma, sigma, torch.ones_like(sigma), 1000 * sigma)

    def at(self, log_snr: Tensor) -> Level:
        """alpha / sigma = exp(lambda)."""
        sigma = torch.sigmoid(-log_snr)
        return Level(torch.sigmoid(log_snr), sigma, torch.ones_like(sigma), 1000 * sigma)

    def time(self, clock: Tensor) -> Tensor:
        """t = clock / 1000 / last."""
        return clock / 1000 / self.last
