"""Spacings: the number of steps and their levels. `grid(path)` returns the N + 1 levels of a solver in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.path import Level, Path, Table
from ldm.diffusion.times import positive, shifted

End = Literal["zero", "table"]
LEAST = {"steps": 1, "spare": 0, "offset": 0}  # the smallest value of each integer


@dataclass(kw_only=True)
class Spacing:
    """Levels by a rule, then the end: sigma = 0, or the least noisy level trained (`table`)."""

    end: End = "zero"  # stop at no noise, or at the least noisy level trained

    def __post_init__(self) -> None:
        if self.end not in ("zero", "table"):
            raise ValueError(f"end: must be zero or table, got {self.end}")
        for name, value in vars(self).items():
            if name in LEAST and value < LEAST[name]:
                raise ValueError(f"{name}: must be at least {LEAST[name]}, got {value}")
            if name in ("shift", "rho"):
                positive(name, value)

    def levels(self, path: Path) -> Level:
        """The N levels at which the network is evaluated."""
        raise NotImplementedError

    def grid(self, path: Path) -> Level:
        """(N + 1,) levels of falling noise, or N where the rule already stops at the end."""
        levels = self.levels(path)
        last = path.data() if self.end == "zero" else path.level(torch.tensor([path.t_min], dtype=torch.float64))
        ended = len(levels.t) > 1 and bool((last.log_snr - levels.log_snr[-1]).abs() < 1e-9)
        grid = levels if ended else Level(*(torch.cat(pair) for pair in zip(levels, last)))
        falling = grid.log_snr.diff() > 0
        if not falling.all():
            row = int((~falling).nonzero()[0])
            raise ValueError(f"steps: the noise level does not decrease from step {row} to {row + 1}; try fewer steps")
        return grid


@dataclass(kw_only=True)
class Counted(Spacing):
    """A rule for any number of levels."""

    steps: int  # number of network evaluations


@dataclass(kw_only=True)
class Trailing(Counted):
    """Equal steps of t from pure noise (Lin et al. 2023); `shift` moves them towards the noise for large images."""

    shift: float = 1.0  # above 1, more steps at high noise, for large images

    def levels(self, path: Path) -> Level:
        """t = 1, 1 - 1/N, ..., 1/N."""
        t = shifted(_line(self.steps, 0, self.steps).flip(0)[:-1] / self.steps, self.shift)
        return path.level(_rounded(path, t, first=1))


@dataclass(kw_only=True)
class Linspace(Counted):
    """Equal steps of t from the noisiest to the least noisy level trained."""

    spare: int = 0  # further levels that are spaced with the others and then removed

    def levels(self, path: Path) -> Level:
        """t = 1, ..., t_min."""
        t = _line(self.steps + self.spare - 1, 1.0, path.t_min)[: self.steps]
        return path.level(_rounded(path, t, first=0))


@dataclass(kw_only=True)
class Leading(Counted):
    """Stable Diffusion's spacing: every (T // N)-th step of a table, from `offset` on.

    diffusers' multistep solvers have `spare` = 1: every (T // (N + 1))-th step without the last.
    """

    offset: int = 1  # the first step of the table
    spare: int = 0  # further levels that are spaced with the others and then removed

    def levels(self, path: Path) -> Level:
        """k = offset + (T // N) * (N - 1, ..., 0)."""
        if not isinstance(path, Table):
            raise ValueError("type: leading needs a table of betas; this path has none; try trailing")
        stride = path.steps // (self.steps + self.spare)
        first, last = (self.offset + stride * row for row in (self.steps + self.spare - 1, self.spare))
        if stride == 0 or first >= path.steps:
            raise ValueError(f"steps: the path has {path.steps}, got {self.steps} from offset {self.offset}; try fewer")
        return path.level(path.time(_line(self.steps - 1, first, last)))


class LogSNR(Counted):
    """Equal steps of the log-SNR (Lu et al. 2022)."""

    def levels(self, path: Path) -> Level:
        """lambda from the noisiest finite level to the least noisy trained."""
        return _from_the_top(path, path.at(_line(self.steps - 1, *_ends(path))))


@dataclass(kw_only=True)
class Karras(Counted):
    """EDM eq. 5: equal steps of (sigma / alpha)^(1 / rho), denser near the data."""

    rho: float = 7.0  # density near the data

    def levels(self, path: Path) -> Level:
        """sigma / alpha from the noisiest finite level to the least noisy trained."""
        first, last = (math.exp(-log_snr / self.rho) for log_snr in _ends(path))
        sigma = _line(self.steps - 1, first, last) ** self.rho
        return _from_the_top(path, path.at(-sigma.log()))


@dataclass(kw_only=True)
class Explicit(Spacing):
    """A list of times as the network receives them: steps k of a table, 1000 t of a flow."""

    times: list[float]  # falling

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times or any(later >= earlier for earlier, later in pairwise(self.times)):
            raise ValueError(f"times: must be strictly decreasing, got {self.times}")

    def levels(self, path: Path) -> Level:
        """The levels at these times."""
        t = path.time(torch.tensor(self.times, dtype=torch.float64))
        levels = path.level(t.clamp(0, 1))
        if not ((levels.sigma > 0) & ((t - t.clamp(0, 1)).abs() < 1e-6)).all():
            raise ValueError(f"times: must lie between the data and t = 1 of the path, got {self.times}")
        return levels


def _line(steps: int, start: float, stop: float) -> Tensor:
    """steps + 1 equally spaced numbers, exact where they are whole; only the start if steps is 0."""
    index = torch.arange(steps + 1, dtype=torch.float64)
    return start + (stop - start) * (index / max(steps, 1))


def _rounded(path: Path, t: Tensor, first: int) -> Tensor:
    """The nearest step on a table, counted from `first`, with halves rounded to even; t on other paths."""
    if not isinstance(path, Table):
        return t
    count = (t * path.steps).round(decimals=6) - 1 + first  # t * T is not exact, so halves would be lost
    return path.time((count.round() - first).clamp(min=0))


def _ends(path: Path) -> list[float]:
    """The log-SNR of the noisiest finite level and of the least noisy trained."""
    return [path.level(torch.tensor([t], dtype=torch.float64)).log_snr.item() for t in (path.t_max, path.t_min)]


def _from_the_top(path: Path, levels: Level) -> Level:
    """Start exactly at t = 1, where the prior is, even if its log-SNR is infinite."""
    top = path.level(torch.ones(1, dtype=torch.float64))
    return Level(*(torch.cat([first, rest[1:]]) for first, rest in zip(top, levels)))
