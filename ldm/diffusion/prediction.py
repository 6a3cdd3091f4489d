"""What a network predicts: y = p * x0 + q * eps, one row (p, q) per kind, and one inversion for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion import bound
from ldm.diffusion.path import Level, Path, Row, Scalar, Table, mix
from ldm.diffusion.path import Prediction as Prediction  # part of this module's interface

AnyDenoiser = Callable[[Tensor, Row, Condition | None], Prediction]  # a Denoiser, or one under guidance


class Target:
    """One kind of output; subclasses define `row`."""

    channels = 1  # output channels per channel of data

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        """(p, q) of y = p * x0 + q * eps at this level."""
        raise NotImplementedError

    def recover(self, x: Tensor, y: Tensor, level: Level | Row) -> Prediction:
        """The prediction from all channels of the network's output."""
        return self.solve(x, y, level)

    def solve(self, x: Tensor, y: Tensor, level: Level | Row) -> Prediction:
        """Solve y = p * x0 + q * eps and x = alpha * x0 + sigma * eps for x0 and eps."""
        p, q = self.row(level)
        det = level.alpha * q - level.sigma * p
        x0 = mix(q / det, x, -level.sigma / det, y)
        return Prediction(x0, mix(-p / det, x, level.alpha / det, y))

    def raw(self, prediction: Prediction, level: Level | Row) -> Tensor:
        """The network's output that corresponds to a prediction."""
        p, q = self.row(level)
        return mix(p, prediction.x0, q, prediction.eps)

    def loss(self, y: Tensor, x: Tensor, x0: Tensor, noise: Tensor, level: Level, path: Path) -> Tensor:
        """Mean squared error of the output, per sample: (B,)."""
        return (y - self.raw(Prediction(x0, noise), level)).square().flatten(1).mean(1)

    def check(self, path: Path) -> None:
        """Refuse a path on which the output does not determine x0."""
        noisiest = path.level(torch.ones(1, dtype=torch.float64)).rows()[0]
        p, q = self.row(noisiest)
        if noisiest.alpha * q - noisiest.sigma * p == 0:
            raise ValueError("type: eps does not determine x0 where alpha = 0, as on this path at t = 1; try v")


class Eps(Target):
    """The noise (DDPM)."""

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        return 0.0, 1.0


class X0(Target):
    """The data."""

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        return 1.0, 0.0


class V(Target):
    """v = alpha * eps - sigma * x0 (Salimans & Ho 2022)."""

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        return -level.sigma, level.alpha


class Flow(Target):
    """The velocity eps - x0 of rectified flow."""

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        return -1.0, 1.0


@dataclass(kw_only=True, frozen=True)
class EDM(Target):
    """EDM's F (eq. 7), with unit variance where x0 has standard deviation sigma_data; for paths with alpha = 1."""

    sigma_data: float

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        """y = s / (d sqrt(s^2 + d^2)) * x0 - d / sqrt(s^2 + d^2) * eps."""
        norm = (level.sigma**2 + self.sigma_data**2) ** 0.5
        return level.sigma / (self.sigma_data * norm), -self.sigma_data / norm

    def check(self, path: Path) -> None:
        """The row holds only where alpha = 1."""
        if path.level(torch.ones(1, dtype=torch.float64)).alpha.item() != 1:
            raise ValueError("type: edm needs a path with alpha = 1; try path.type=ve")


@dataclass(kw_only=True, frozen=True)
class LearnedRange(Target):
    """Any prediction plus a learned variance in as many further channels (Improved DDPM eq. 15 and 16; ADM, DiT)."""

    channels = 2

    of: Target  # the prediction of the mean
    bound_weight: float = 1e-3  # weight of the variational bound; the plain loss has 1

    def __post_init__(self) -> None:
        if self.of.channels != 1:
            raise ValueError("of: already has a learned variance; expected eps, x0, v or flow")
        if self.bound_weight < 0:
            raise ValueError(f"bound_weight: must be at least 0, got {self.bound_weight}")

    def row(self, level: Level | Row) -> tuple[Scalar, Scalar]:
        return self.of.row(level)

    def recover(self, x: Tensor, y: Tensor, level: Level | Row) -> Prediction:
        """The first half of the channels is the prediction, the second the variance in [-1, 1]."""
        y, v = y.chunk(2, dim=1)
        return self.solve(x, y, level)._replace(frac=(v + 1) / 2)

    def loss(self, y: Tensor, x: Tensor, x0: Tensor, noise: Tensor, level: Level, path: Path) -> Tensor:
        """L_hybrid = L_simple + weight * T * L_t in bits; the bound trains only the variance."""
        assert isinstance(path, Table)  # `check` refuses other paths
        simple = self.of.loss(y.chunk(2, dim=1)[0], x, x0, noise, level, path)
        prediction = self.recover(x, y, level)
        prediction = prediction._replace(x0=prediction.x0.detach())
        return simple + self.bound_weight * path.steps * bound.term(prediction, x0, path, level, "learned")

    def check(self, path: Path) -> None:
        """The range lies between the variances of a table's neighbouring steps."""
        if not isinstance(path, Table):
            raise ValueError("type: learned_range needs a path with a table of betas; try path.type=linear")
        self.of.check(path)
