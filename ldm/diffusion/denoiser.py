"""A network made into a denoiser: (x, level, condition) -> Prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.path import Level, Path, Row, expand
from ldm.diffusion.prediction import Prediction, Target


class Denoiser(nn.Module):
    """A backbone on a path with a kind of prediction: scale the input, call the network, solve for (x0, eps).

    Channels are dimension 1: what a condition concatenates and what a learned variance adds lie there.
    """

    def __init__(self, backbone: nn.Module, path: Path, prediction: Target):
        super().__init__()
        prediction.check(path)
        self.backbone, self.path, self.prediction = backbone, path, prediction

    def forward(self, x: Tensor, level: Level | Row, condition: Condition | None = None) -> Prediction:
        """What the network believes of x."""
        return self.prediction.recover(x, self.output(x, level, condition), level)

    def output(self, x: Tensor, level: Level | Row, condition: Condition | None = None) -> Tensor:
        """The network's own output y in x's type, whatever autocast makes the network compute in."""
        if isinstance(level, Row):
            t = torch.full((len(x),), level.t, dtype=torch.float32, device=x.device)  # (B,)
            scaled = x if level.c_in == 1 else x * level.c_in
        else:
            t = level.t.to(x.device, torch.float32)  # (B,)
            scaled = x * expand(level.c_in, x)
        keywords = {}
        if condition is not None:
            known = {"tokens": condition.tokens, "mask": condition.mask, "pooled": condition.pooled}
            keywords = {name: value for name, value in known.items() if value is not None}
            if condition.concat is not None:
                scaled = torch.cat([scaled, condition.concat.to(scaled)], dim=1)  # (B, C + C', ...)
        y = self.backbone(scaled, t, **keywords)
        expected = (len(x), x.shape[1] * self.prediction.channels, *x.shape[2:])
        if y.shape != expected:
            raise ValueError(f"backbone: its output does not fit; got shape {tuple(y.shape)}; expected {expected}")
        return y.to(x.dtype)

    def loss(self, x0: Tensor, level: Level, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """The prediction's own loss at these levels and with this noise, per sample and unweighted: (B,)."""
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise
        return self.prediction.loss(self.output(x, level, condition), x, x0, noise, level, self.path)
