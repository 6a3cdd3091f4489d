"""A denoiser made of a network, a path and a prediction: (x, level, condition) -> Prediction."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.path import Level, Path, Row, expand
from ldm.diffusion.prediction import Prediction, Target


class Denoiser(nn.Module):
    """Scale the input, call the backbone, and solve its output for (x0, eps).

    `condition.concat` joins x as channels; every other field that is set goes to the backbone by its name. Channels are
    dimension 1, also those of a learned variance.
    """

    def __init__(self, backbone: nn.Module, path: Path, prediction: Target):
        super().__init__()
        prediction.check(path)
        self.backbone, self.path, self.prediction = backbone, path, prediction
        parameters = inspect.signature(backbone.forward).parameters
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes = {"concat", *parameters}

    def check(self, names: Iterable[str]) -> None:
        """Refuse a condition's fields that the backbone does not take."""
        for name in names:
            if name not in self.takes and not self.takes_any:
                kind = type(self.backbone).__name__
                raise ValueError(f"type: this backbone takes no {name}; got {kind}; expected {name}= in its forward")

    def forward(self, x: Tensor, level: Level | Row, condition: Condition | None = None) -> Prediction:
        """The prediction of x0 and eps from x at this level."""
        return self.prediction.recover(x, self.output(x, level, condition), level)

    def output(self, x: Tensor, level: Level | Row, condition: Condition | None = None) -> Tensor:
        """The network's output y in the type of x, whatever type autocast makes the network compute in."""
        if isinstance(level, Row):
            t = torch.full((len(x),), level.t, dtype=torch.float32, device=x.device)  # (B,)
            scaled = x if level.c_in == 1 else x * level.c_in
        else:
            t = level.t.to(x.device, torch.float32)  # (B,)
            scaled = x * expand(level.c_in, x)
        fields = {} if condition is None else dict(condition.items())
        self.check(fields)
        if (concat := fields.pop("concat", None)) is not None:
            scaled = torch.cat([scaled, concat.to(scaled)], dim=1)  # (B, C + C', ...)
        y: Tensor = self.backbone(scaled, t, **fields)
        expected = (len(x), x.shape[1] * self.prediction.channels, *x.shape[2:])
        if y.shape != expected:
            raise ValueError(f"backbone: output has the wrong shape; got shape {tuple(y.shape)}; expected {expected}")
        return y.to(x.dtype)

    def loss(self, x0: Tensor, level: Level, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """The prediction's loss at these levels and with this noise, per sample and unweighted: (B,)."""
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise
        return self.prediction.loss(self.output(x, level, condition), x, x0, noise, level, self.path)
