"""The adversarial half of the first stage's loss (Esser et al. 2021, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import at_least_float32


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim and Ye 2017): no loss for logits beyond 1 and -1."""
    return 0.5 * (F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(fake)).mean())


def vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's cross entropy (Goodfellow et al. 2014, eq. 1), halved like the hinge loss."""
    return 0.5 * (F.softplus(-at_least_float32(real)).mean() + F.softplus(at_least_float32(fake)).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's loss with either: minus the discriminator's mean logit."""
    return -at_least_float32(fake).mean()


def adaptive_weight(distance: Tensor, adversarial: Tensor, limit: float) -> Tensor:
    """Esser et al.'s eq. 7: the ratio of the norms of both losses' gradients at the decoder's last layer."""
    return (distance.norm() / (adversarial.norm() + 1e-4)).clamp(0, limit)


def slope_at(x: Tensor, loss: Tensor) -> Tensor:
    """A loss's gradient at x only; no parameter gets one."""
    (slope,) = torch.autograd.grad(loss, x)
    return at_least_float32(slope)


def pulled_back(slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient at the weight of the layer that made x, from a loss's gradient at x; keeps the graph of x."""
    (pulled,) = torch.autograd.grad(x, weight, slope.to(x.dtype), retain_graph=True)
    return at_least_float32(pulled)


def with_slope(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """A scalar with this value and this gradient at x."""
    line = (x * slope).sum()
    return value.detach() + (line - line.detach())
