"""Guidance: takes a denoiser and gives one of the same signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.path import Level, Row, expand, mix
from ldm.diffusion.prediction import Prediction


class Guidance:
    """Classifier-free guidance eps_u + cfg * (eps_c - eps_u) (Ho & Salimans 2022; their w is cfg - 1).

    `rescale` pulls the output's deviation back to the conditional one's (Lin et al. 2023, eq. 15 and 16);
    `interval` guides only where low <= sigma / alpha <= high (Kynkaanniemi et al. 2024).
    """

    def __init__(
        self,
        *,
        cfg: float = 1.0,  # 1 is none
        rescale: float = 0.0,  # 0 to 1: how far the output's deviation is pulled back
        interval: tuple[float, float] | None = None,  # of sigma / alpha; null is everywhere
        batched: bool = True,  # both evaluations in one batch, for speed; or in two, for memory
    ):
        if not math.isfinite(cfg):
            raise ValueError(f"cfg: must be finite, got {cfg}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale: must lie between 0 and 1, got {rescale}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval: must rise from at least 0, got {list(interval)}")
        self.cfg, self.rescale, self.interval, self.batched = cfg, rescale, interval, batched

    def __call__(self, denoiser, negative: Condition | None) -> Guided:
        """The guided denoiser; `negative` is what to move away from, the null or a negative prompt."""
        return Guided(denoiser, self, negative)

    def acts_on(self, level: Row) -> bool:
        """Whether a second evaluation would change anything here."""
        if self.cfg == 1 or self.interval is None:
            return self.cfg != 1
        low, high = self.interval
        return low * level.alpha <= level.sigma <= high * level.alpha


class Guided:
    """A denoiser under classifier-free guidance."""

    def __init__(self, denoiser, guidance: Guidance, negative: Condition | None):
        self.denoiser, self.guidance, self.negative = denoiser, guidance, negative
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None) -> Prediction:
        """One evaluation where guidance does nothing, else two: in one batch, or in two calls."""
        if not self.guidance.acts_on(level):
            return self.denoiser(x, level, condition)
        if self.guidance.batched and condition is not None and self.negative is not None:
            both = self.denoiser(torch.cat([x, x]), level, Condition.stack([condition, self.negative]))
            towards, away = (Prediction(*half) for half in zip(*(_halves(field) for field in both)))
        else:
            towards, away = self.denoiser(x, level, condition), self.denoiser(x, level, self.negative)
        cfg = self.guidance.cfg
        guided = towards._replace(x0=torch.lerp(away.x0, towards.x0, cfg), eps=torch.lerp(away.eps, towards.eps, cfg))
        return self._rescaled(x, level, guided, towards) if self.guidance.rescale > 0 else guided

    def _rescaled(self, x: Tensor, level: Row, guided: Prediction, towards: Prediction) -> Prediction:
        """The network's output scaled, and x0 and eps solved for again: it differs between eps, x0 and v."""
        if self.prediction is None:
            raise ValueError("rescale: needs a denoiser that names its kind of prediction; expected a Denoiser")
        y, y_towards = self.prediction.raw(guided, level), self.prediction.raw(towards, level)
        factor = y_towards.flatten(1).std(1) / y.flatten(1).std(1)  # (B,)
        y = y * expand(torch.lerp(torch.ones_like(factor), factor, self.guidance.rescale), y)
        again = self.prediction.solve(x, y, level)
        return guided._replace(x0=again.x0, eps=again.eps)


def _halves(field: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if field is None else field.chunk(2)


class ClassifierGuided:
    """A denoiser pushed along the gradient of log p(y | x_t) (Dhariwal & Nichol 2021).

    form "score" is their algorithm 2, eps - scale * sigma * gradient, for any solver; "mean" is their algorithm 1,
    which moves the mean of a stochastic step by its variance times scale * gradient.
    """

    def __init__(
        self,
        denoiser,
        log_prob: Callable[[Tensor, Level | Row], Tensor],
        scale: float = 1.0,
        form: Literal["score", "mean"] = "score",
    ):
        if form not in ("score", "mean"):
            raise ValueError(f"form: must be score or mean, got {form}")
        self.denoiser, self.log_prob, self.scale, self.form = denoiser, log_prob, scale, form
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None = None) -> Prediction:
        """`log_prob(x, level)` is (B,); its gradient is taken here."""
        prediction = self.denoiser(x, level, condition)
        push = self.scale * self._gradient(x, level)
        if self.form == "mean":
            return prediction._replace(shift=push)
        # at alpha = 0 the gradient is zero and sigma^2 / alpha infinite: their limit is not to be had from here
        x0 = mix(1.0, prediction.x0, level.sigma**2 / level.alpha, push) if level.alpha > 0 else prediction.x0
        return prediction._replace(x0=x0, eps=mix(1.0, prediction.eps, -level.sigma, push))

    def _gradient(self, x: Tensor, level: Row) -> Tensor:
        through = torch.is_grad_enabled() and x.requires_grad  # somebody differentiates the sampler itself
        with torch.inference_mode(False), torch.enable_grad():
            x = x if through else x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, level).sum(), x, create_graph=through)[0]
