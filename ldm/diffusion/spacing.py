"""Spacings: how many steps, and where. `grid(path)` gives the N + 1 levels that a solver walks down, in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.path import Level, Path, Table
from ldm.diffusion.times import positive, shifted

End = Literal["zero", "table"]


class Spacing:
    """The common part: N levels from the rule, then the end: sigma = 0, or the least noisy level trained (`table`)."""

    def __init__(
        self,
        *,
        steps: int,  # levels at which the network is asked
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        if end not in ("zero", "table"):
            raise ValueError(f"end: must be zero or table, got {end}")
        self.steps, self.end = at_least("steps", steps, 1), end

    def levels(self, path: Path) -> Level:
        """The N levels at which the network is asked."""
        raise NotImplementedError

    def grid(self, path: Path) -> Level:
        """(N + 1,) levels of falling noise, or N where the rule ends at the end itself."""
        levels = self.levels(path)
        last = path.data() if self.end == "zero" else path.level(torch.tensor([path.t_min], dtype=torch.float64))
        there = self.steps > 1 and bool((last.log_snr - levels.log_snr[-1]).abs() < 1e-9)
        grid = levels if there else Level(*(torch.cat(pair) for pair in zip(levels, last)))
        falling = grid.log_snr.diff() > 0
        if not falling.all():
            row = int((~falling).nonzero()[0])
            raise ValueError(f"steps: the noise does not fall from row {row} to {row + 1} of the grid; try fewer steps")
        return grid


class Trailing(Spacing):
    """Equal steps of t that begin at pure noise (Lin et al. 2023); `shift` moves them towards it for large images."""

    def __init__(
        self,
        *,
        steps: int,  # levels at which the network is asked
        shift: float = 1.0,  # above 1, towards the noise, as large images want it
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        super().__init__(steps=steps, end=end)
        self.shift = positive("shift", shift)

    def levels(self, path: Path) -> Level:
        """t = 1, 1 - 1/N, ..., 1/N."""
        t = shifted(_line(self.steps, 0, self.steps).flip(0)[:-1] / self.steps, self.shift)
        return path.level(_rounded(path, t, first=1))


class Linspace(Spacing):
    """Equal steps of t from the noisiest to the least noisy level trained; `spare` more than N, and then left out."""

    def __init__(
        self,
        *,
        steps: int,  # levels at which the network is asked
        spare: int = 0,  # levels more that are counted and left out
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        super().__init__(steps=steps, end=end)
        self.spare = at_least("spare", spare, 0)

    def levels(self, path: Path) -> Level:
        """t = 1, ..., t_min."""
        t = _line(self.steps + self.spare - 1, 1.0, path.t_min)[: self.steps]
        return path.level(_rounded(path, t, first=0))


class Leading(Spacing):
    """Stable Diffusion's own: every (T // N)-th step of a table, counted from `offset`.

    diffusers' multistep solvers have one to `spare`: every (T // (N + 1))-th step, but for the last.
    """

    def __init__(
        self,
        *,
        steps: int,  # levels at which the network is asked
        offset: int = 1,  # the first step that is counted from
        spare: int = 0,  # levels more that are counted and left out
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        super().__init__(steps=steps, end=end)
        self.offset, self.spare = at_least("offset", offset, 0), at_least("spare", spare, 0)

    def levels(self, path: Path) -> Level:
        """k = offset + (T // N) * (N - 1, ..., 0)."""
        if not isinstance(path, Table):
            raise ValueError("type: leading counts the steps of a table of betas; this path has none; try trailing")
        stride = path.steps // (self.steps + self.spare)
        first, last = (self.offset + stride * row for row in (self.steps + self.spare - 1, self.spare))
        if stride == 0 or first >= path.steps:
            raise ValueError(f"steps: the path has {path.steps}, got {self.steps} from offset {self.offset}; try fewer")
        return path.level(path.time(_line(self.steps - 1, first, last)))


class LogSNR(Spacing):
    """Equal steps of the log-SNR (Lu et al. 2022)."""

    def levels(self, path: Path) -> Level:
        """lambda from the noisiest finite level to the least noisy trained."""
        high, low = _log_snr(path, path.t_max), _log_snr(path, path.t_min)
        return _from_the_top(path, path.at(_line(self.steps - 1, high, low)))


class Karras(Spacing):
    """EDM eq. 5: equal steps of (sigma / alpha)^(1 / rho), dense near the data."""

    def __init__(
        self,
        *,
        steps: int,  # levels at which the network is asked
        rho: float = 7.0,  # how dense they are near the data
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        super().__init__(steps=steps, end=end)
        self.rho = positive("rho", rho)

    def levels(self, path: Path) -> Level:
        """sigma / alpha between those of the noisiest finite level and the least noisy trained."""
        ends = [math.exp(-_log_snr(path, t) / self.rho) for t in (path.t_max, path.t_min)]
        sigma = _line(self.steps - 1, *ends) ** self.rho
        return _from_the_top(path, path.at(-sigma.log()))


class Explicit(Spacing):
    """The times listed, as the network is told them: steps k of a table, 1000 t of a flow."""

    def __init__(
        self,
        *,
        times: list[float],  # falling
        end: End = "zero",  # where it stops: without noise, or at the least noisy level that is trained
    ):
        if not times or any(later >= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"times: must be numbers that fall, got {times}")
        super().__init__(steps=len(times), end=end)
        self.times = times

    def levels(self, path: Path) -> Level:
        """The levels at these times."""
        t = path.time(torch.tensor(self.times, dtype=torch.float64))
        levels = path.level(t.clamp(0, 1))
        if not ((levels.sigma > 0) & ((t - t.clamp(0, 1)).abs() < 1e-6)).all():
            raise ValueError(f"times: must lie between the data and t = 1 of the path, got {self.times}")
        return levels


def at_least(name: str, number: int, least: int) -> int:
    """A number that is not too small."""
    if number < least:
        raise ValueError(f"{name}: must be at least {least}, got {number}")
    return number


def _line(steps: int, start: float, stop: float) -> Tensor:
    """steps + 1 equally spaced numbers, exact where they are whole; the start alone for no step."""
    index = torch.arange(steps + 1, dtype=torch.float64)
    return start + (stop - start) * (index / max(steps, 1))


def _rounded(path: Path, t: Tensor, first: int) -> Tensor:
    """On a table, the nearest step; a half goes to the even one, as they are counted from `first`. Elsewhere t."""
    if not isinstance(path, Table):
        return t
    count = (t * path.steps).round(decimals=6) - 1 + first  # a half is one only without the noise of t * T
    return path.time((count.round() - first).clamp(min=0))


def _log_snr(path: Path, t: float) -> float:
    return path.level(torch.tensor([t], dtype=torch.float64)).log_snr.item()


def _from_the_top(path: Path, levels: Level) -> Level:
    """Begin at t = 1 exactly, where the prior is, also when its log-SNR is infinite."""
    top = path.level(torch.ones(1, dtype=torch.float64))
    return Level(*(torch.cat([first, rest[1:]]) for first, rest in zip(top, levels)))
