"""Guidance takes a denoiser and returns one with the same signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.path import Level, Row, expand, mix
from ldm.diffusion.prediction import AnyDenoiser, Prediction


@dataclass(kw_only=True, frozen=True)
class Guidance:
    """Classifier-free guidance eps_u + cfg * (eps_c - eps_u) (Ho & Salimans 2022; their w is cfg - 1).

    `rescale` moves the output's standard deviation back to the conditional output's (Lin et al. 2023, eq. 15 and 16);
    `interval` guides only where low <= sigma / alpha <= high (Kynkaanniemi et al. 2024).
    """

    cfg: float = 1.0  # 1 is no guidance
    rescale: float = 0.0  # 0 to 1: how far the output's standard deviation is moved back
    interval: tuple[float, float] | None = None  # of sigma / alpha where guidance applies; null is everywhere
    batched: bool = True  # both evaluations in one batch; false saves memory

    def __post_init__(self) -> None:
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg: must be finite, got {self.cfg}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale: must lie between 0 and 1, got {self.rescale}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval: must be two increasing numbers, not negative, got {list(self.interval)}")

    def __call__(self, denoiser: AnyDenoiser, negative: Condition | None) -> Guided:
        """The guided denoiser; `negative` is the condition to move away from: the null or a negative prompt."""
        return Guided(denoiser, self, negative)

    def acts_on(self, level: Row) -> bool:
        """True if guidance changes the prediction at this level."""
        if self.cfg == 1 or self.interval is None:
            return self.cfg != 1
        low, high = self.interval
        return low * level.alpha <= level.sigma <= high * level.alpha


class Guided:
    """A denoiser under classifier-free guidance."""

    def __init__(self, denoiser: AnyDenoiser, guidance: Guidance, negative: Condition | None):
        self.denoiser, self.guidance, self.negative = denoiser, guidance, negative
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None) -> Prediction:
        """One evaluation where guidance changes nothing, else two, in one batch or in two calls."""
        if not self.guidance.acts_on(level):
            return self.denoiser(x, level, condition)
        if self.guidance.batched and condition is not None and self.negative is not None:
            both = self.denoiser(torch.cat([x, x]), level, Condition.stack([condition, self.negative]))
            towards, away = (
                Prediction(*half) for half in zip(*((None, None) if x is None else x.chunk(2) for x in both))
            )
        else:
            towards, away = self.denoiser(x, level, condition), self.denoiser(x, level, self.negative)
        cfg = self.guidance.cfg
        guided = towards._replace(x0=torch.lerp(away.x0, towards.x0, cfg), eps=torch.lerp(away.eps, towards.eps, cfg))
        return self._rescaled(x, level, guided, towards) if self.guidance.rescale > 0 else guided

    def _rescaled(self, x: Tensor, level: Row, guided: Prediction, towards: Prediction) -> Prediction:
        """Scale the network's output and solve for x0 and eps again; the result depends on the kind of prediction."""
        if self.prediction is None:
            raise ValueError("rescale: needs a denoiser with a `prediction`; expected a Denoiser")
        y, y_towards = self.prediction.raw(guided, level), self.prediction.raw(towards, level)
        factor = y_towards.flatten(1).std(1) / y.flatten(1).std(1)  # (B,)
        y = y * expand(torch.lerp(torch.ones_like(factor), factor, self.guidance.rescale), y)
        again = self.prediction.solve(x, y, level)
        return guided._replace(x0=again.x0, eps=again.eps)


class ClassifierGuided:
    """A denoiser guided by the gradient of log p(y | x_t) (Dhariwal & Nichol 2021).

    The form "score" is their algorithm 2, eps - scale * sigma * gradient, for any solver; "mean" is their algorithm 1,
    which moves the mean of a stochastic step by its variance times scale * gradient.
    """

    def __init__(
        self,
        denoiser: AnyDenoiser,
        log_prob: Callable[[Tensor, Level | Row], Tensor],
        scale: float = 1.0,
        form: Literal["score", "mean"] = "score",
    ):
        if form not in ("score", "mean"):
            raise ValueError(f"form: must be score or mean, got {form}")
        self.denoiser, self.log_prob, self.scale, self.form = denoiser, log_prob, scale, form
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None = None) -> Prediction:
        """One prediction and one gradient of `log_prob(x, level)`, which is (B,)."""
        prediction = self.denoiser(x, level, condition)
        push = self.scale * self._gradient(x, level)
        if self.form == "mean":
            return prediction._replace(shift=push)
        # at alpha = 0 the gradient is zero and sigma^2 / alpha infinite; the limit of their product is unknown here
        x0 = mix(1.0, prediction.x0, level.sigma**2 / level.alpha, push) if level.alpha > 0 else prediction.x0
        return prediction._replace(x0=x0, eps=mix(1.0, prediction.eps, -level.sigma, push))

    def _gradient(self, x: Tensor, level: Row) -> Tensor:
        through = torch.is_grad_enabled() and x.requires_grad  # the caller differentiates the sampler
        with torch.inference_mode(False), torch.enable_grad():
            x = x if through else x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, level).sum(), x, create_graph=through)[0]
