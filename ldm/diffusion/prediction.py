"""What a network is asked to output: y = p * x0 + q * eps, one row (p, q) per kind, and one inversion for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion import bound
from ldm.diffusion.path import Level, Path, Row, Table, mix


class Prediction(NamedTuple):
    """What a denoiser believes of x = alpha * x0 + sigma * eps."""

    x0: Tensor
    eps: Tensor
    frac: Tensor | None = None  # where a learned log-variance lies, 0 = small and 1 = large (Improved DDPM eq. 15)
    shift: Tensor | None = None  # to be added to a stochastic step's mean, times its variance


class Target:
    """One kind of output; subclasses give `row`."""

    channels = 1  # output channels per channel of data

    def row(self, level: Level | Row):
        """(p, q) of y = p * x0 + q * eps at this level."""
        raise NotImplementedError

    def recover(self, x: Tensor, y: Tensor, level: Level | Row) -> Prediction:
        """A prediction from all channels of the network's output."""
        return self.solve(x, y, level)

    def solve(self, x: Tensor, y: Tensor, level: Level | Row) -> Prediction:
        """y = p * x0 + q * eps and x = alpha * x0 + sigma * eps, solved for x0 and eps."""
        p, q = self.row(level)
        det = level.alpha * q - level.sigma * p
        x0 = mix(q / det, x, -level.sigma / det, y)
        return Prediction(x0, mix(-p / det, x, level.alpha / det, y))

    def raw(self, prediction: Prediction, level: Level | Row) -> Tensor:
        """The network's output that says this."""
        p, q = self.row(level)
        return mix(p, prediction.x0, q, prediction.eps)

    def loss(self, y: Tensor, x: Tensor, x0: Tensor, noise: Tensor, level: Level, path: Path) -> Tensor:
        """Mean squared error of the output, per sample: (B,)."""
        return (y - self.raw(Prediction(x0, noise), level)).square().flatten(1).mean(1)

    def check(self, path: Path) -> None:
        """Refuse a path on which the output says nothing about x0."""
        noisiest = path.level(torch.ones(1, dtype=torch.float64)).rows()[0]
        p, q = self.row(noisiest)
        if noisiest.alpha * q - noisiest.sigma * p == 0:
            raise ValueError("type: eps says nothing of x0 where alpha = 0, as this path has it at t = 1; try v")


class Eps(Target):
    """The noise (DDPM)."""

    def row(self, level):
        """y = eps."""
        return 0.0, 1.0


class X0(Target):
    """The data."""

    def row(self, level):
        """y = x0."""
        return 1.0, 0.0


class V(Target):
    """v = alpha * eps - sigma * x0 (Salimans & Ho 2022)."""

    def row(self, level):
        """y = -sigma * x0 + alpha * eps."""
        return -level.sigma, level.alpha


class Flow(Target):
    """The velocity eps - x0 of rectified flow."""

    def row(self, level):
        """y = eps - x0."""
        return -1.0, 1.0


class EDM(Target):
    """F of EDM eq. 7, of unit variance where x0 has standard deviation sigma_data; for paths with alpha = 1."""

    def __init__(self, *, sigma_data: float):
        self.sigma_data = sigma_data

    def row(self, level):
        """y = s / (d sqrt(s^2 + d^2)) * x0 - d / sqrt(s^2 + d^2) * eps."""
        norm = (level.sigma**2 + self.sigma_data**2) ** 0.5
        return level.sigma / (self.sigma_data * norm), -self.sigma_data / norm

    def check(self, path):
        """The row holds on alpha = 1 alone."""
        if path.level(torch.ones(1, dtype=torch.float64)).alpha.item() != 1:
            raise ValueError("type: edm needs a path with alpha = 1; try path.type=ve")


class LearnedRange(Target):
    """Any prediction plus a learned variance in as many further channels (Improved DDPM eq. 15 and 16; ADM, DiT)."""

    channels = 2

    def __init__(
        self,
        *,
        of: Target,  # the prediction whose variance is learned too
        bound_weight: float = 1e-3,  # the bound's beside the plain loss's 1
    ):
        if of.channels != 1:
            raise ValueError("of: has a learned variance already; expected eps, x0, v or flow")
        if bound_weight < 0:
            raise ValueError(f"bound_weight: must be at least 0, got {bound_weight}")
        self.of, self.bound_weight = of, bound_weight

    def row(self, level):
        """The inner prediction's."""
        return self.of.row(level)

    def recover(self, x, y, level):
        """The first half of the channels is the prediction, the second the variance in [-1, 1]."""
        y, v = y.chunk(2, dim=1)
        return self.solve(x, y, level)._replace(frac=(v + 1) / 2)

    def loss(self, y, x, x0, noise, level, path):
        """L_hybrid = L_simple + weight * T * L_t in bits: the bound trains the variance alone."""
        simple = self.of.loss(y.chunk(2, dim=1)[0], x, x0, noise, level, path)
        prediction = self.recover(x, y, level)
        prediction = prediction._replace(x0=prediction.x0.detach())
        return simple + self.bound_weight * path.steps * bound.term(prediction, x0, path, level, "learned")

    def check(self, path):
        """The range lies between the variances of a table's neighbouring steps."""
        if not isinstance(path, Table):
            raise ValueError("type: learned_range needs a path with a table of betas; try path.type=linear")
        self.of.check(path)
