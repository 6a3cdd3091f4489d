"""Inpainting with any model: the known part of x0 is put in at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.path import Row
from ldm.diffusion.prediction import AnyDenoiser, Prediction


class Inpainted:
    """A denoiser for which x0 is `known` where the mask is 0: it reads the known part noised by z, and predicts it."""

    def __init__(self, denoiser: AnyDenoiser, known: Tensor, z: Tensor, mask: Tensor):
        self.denoiser, self.known, self.z, self.mask = denoiser, known, z, mask
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None = None) -> Prediction:
        """With this, any deterministic solver keeps the known part at exactly alpha * known + sigma * z."""
        x = torch.lerp(level.alpha * self.known + level.sigma * self.z, x, self.mask)
        prediction = self.denoiser(x, level, condition)
        return prediction._replace(
            x0=torch.lerp(self.known, prediction.x0, self.mask), eps=torch.lerp(self.z, prediction.eps, self.mask)
        )

    def kept(self, x: Tensor) -> Tensor:
        """The last x with the known part put in, also on a grid that ends above sigma = 0."""
        return torch.lerp(self.known, x, self.mask)
