"""Inpainting with any model: what is known of x0 is told to the sampler at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.path import Row
from ldm.diffusion.prediction import Prediction


class Inpainted:
    """A denoiser for which x0 is `known` where the mask is 0: it sees the known part noised by z, and predicts it."""

    def __init__(self, denoiser, known: Tensor, z: Tensor, mask: Tensor):
        self.denoiser, self.known, self.z, self.mask = denoiser, known, z, mask
        self.prediction = getattr(denoiser, "prediction", None)

    def __call__(self, x: Tensor, level: Row, condition: Condition | None = None) -> Prediction:
        """Any deterministic solver then keeps the known part at alpha * known + sigma * z exactly."""
        x = torch.lerp(level.alpha * self.known + level.sigma * self.z, x, self.mask)
        prediction = self.denoiser(x, level, condition)
        return prediction._replace(
            x0=torch.lerp(self.known, prediction.x0, self.mask), eps=torch.lerp(self.z, prediction.eps, self.mask)
        )

    def kept(self, x: Tensor) -> Tensor:
        """The end of sampling with the known part as it is, also on a grid that ends above sigma = 0."""
        return torch.lerp(self.known, x, self.mask)
