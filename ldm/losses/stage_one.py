"""The loss of the first stage: pixels, features, the bottleneck's penalty, and a discriminator (LDM, eq. 25).

CompVis's kl loss sums over an image's values and ours averages, the KL too; Adam is invariant to that factor, so their
weights can be used. Two things differ. Their log-variance is omitted, because no optimiser trains it. They clamp the
adaptive weight of the sums at 1e4; `adaptive_limit: 0.0509`, which is 1e4 / (3 * 256 * 256), is the same clamp here.
CompVis's vq loss averages as ours does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.vgg import lpips
from ldm.condition import at_least_float32
from ldm.config import parts
from ldm.models.layers import check_not_negative
from ldm.models.lpips import channel_distances
from ldm.models.quantize import Bottled

Scalars = dict[str, Tensor]


def reconstruction_loss(x: Tensor, y: Tensor, l1: float, l2: float, gradient: float) -> Tensor:
    """The weighted sum of mean absolute, mean squared and gradient differences, in float32 at least."""
    difference = at_least_float32(x) - at_least_float32(y)  # (B, C, H, W)
    loss = difference.new_zeros(len(difference))
    if l1:
        loss = loss + l1 * difference.abs().mean((1, 2, 3))
    if l2:
        loss = loss + l2 * difference.square().mean((1, 2, 3))
    if gradient:
        loss = loss + gradient * total_variation(difference)
    return loss  # (B,)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute vertical plus horizontal differences; of x - y, this is the L1 loss of the gradients."""
    return x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3))  # (B,)


class FeatureDistance(nn.Module):
    """LPIPS' eq. 1 on another network's `features(x) -> list[Tensor]`, with equal weights of all channels."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.network.features(x), self.network.features(y))
        return torch.stack([channel_distances(a, b).sum(1) for a, b in pairs]).sum(0)  # (B,)


def perceptual_distance(name: Literal["lpips", "judge"], vgg: str | None) -> nn.Module:
    """LPIPS with VGG16's weights from a file, or the distance of the shipped judge's features."""
    if name == "lpips":
        return lpips(vgg)
    judge = parts.load(parts.SHIPPED["judge"])()
    return FeatureDistance(copy.deepcopy(judge))  # a copy, because a loss is moved and cast


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


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


class Loss(nn.Module):
    """The losses of autoencoder and discriminator; a weight of 0 omits its term.

    The discriminator trains from step `start - warmup` on, and counts in the autoencoder's loss from `start` on.
    """

    def __init__(
        self,
        *,
        penalty_weight: float,  # weight of the KL divergence, or of the codebook's distance
        l1: float = 1.0,  # weight of absolute pixel differences
        l2: float = 0.0,  # weight of squared pixel differences
        gradient: float = 0.0,  # weight of differences in the pixel gradients
        perceptual: Literal["lpips", "judge"] = "lpips",  # LPIPS, or features of the shipped judge
        perceptual_weight: float = 1.0,  # 0 omits the perceptual loss
        vgg: str | None = None,  # file with LPIPS's VGG16; null is the one from `ldm fetch`
        adversarial: Literal["hinge", "vanilla"] = "hinge",  # the discriminator's loss
        adversarial_weight: float = 0.5,  # 0 omits the adversarial loss
        adaptive: bool = True,  # scale by the ratio of both losses' gradients at the last layer
        adaptive_limit: float = 1e4,  # largest ratio
        start: int = 50_001,  # first step with the adversarial loss
        warmup: int = 0,  # steps before `start` in which only the discriminator trains
    ):
        super().__init__()
        check_not_negative(penalty_weight=penalty_weight, l1=l1, l2=l2, gradient=gradient)
        check_not_negative(perceptual_weight=perceptual_weight, adversarial_weight=adversarial_weight)
        check_not_negative(adaptive_limit=adaptive_limit, start=start, warmup=warmup)
        if l1 == l2 == 0:
            raise ValueError("l1: no pixel loss; got l1=0 and l2=0; expected one of them above 0; try l1=1.0")
        self.l1, self.l2, self.gradient, self.penalty_weight = l1, l2, gradient, penalty_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual = perceptual_distance(perceptual, vgg) if perceptual_weight else None
        self.discriminator_loss = DISCRIMINATOR_LOSSES[adversarial]
        self.adversarial_weight, self.adaptive, self.adaptive_limit = adversarial_weight, adaptive, adaptive_limit
        self.start, self.warmup = start, warmup

    def discriminator_learns(self, step: int) -> bool:
        """True if the discriminator is trained at this step."""
        return self.adversarial_weight > 0 and step >= self.start - self.warmup

    def discriminator_counts(self, step: int) -> bool:
        """True if the autoencoder's loss has its adversarial term at this step."""
        return self.adversarial_weight > 0 and step >= self.start

    def distances(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted pixel and perceptual distances, per sample."""
        pixels = reconstruction_loss(x, reconstruction, self.l1, self.l2, self.gradient)
        if self.perceptual is None:
            return pixels, torch.zeros_like(pixels)
        return pixels, self.perceptual_weight * self.perceptual(x, reconstruction)  # (B,) each

    def penalty(self, bottled: Bottled, x: Tensor) -> Tensor:
        """The weighted penalty per sample: VQ's eq. 3, or the KL in nats per value of the image."""
        values = x[0].numel() if bottled.codes is None else 1
        return self.penalty_weight / values * bottled.penalty  # (B,)

    def generator(
        self,
        x: Tensor,
        reconstruction: Tensor,
        bottled: Bottled,
        logits_fake: Tensor | None,
        step: int,
        last_layer: Tensor,
        average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> tuple[Tensor, Scalars]:
        """The autoencoder's loss and its terms for the log; `average` means a gradient over ranks.

        The gradients at the reconstruction are computed here once, and the backward pass starts from them, so the
        discriminator gets none.
        """
        pixels, features = (distance.mean() for distance in self.distances(x, reconstruction))
        penalty = self.penalty(bottled, x).mean()
        value, slope = pixels + features, slope_at(reconstruction, pixels + features)
        scalars = {"reconstruction": pixels, "perceptual": features, "penalty": penalty}
        if logits_fake is not None and self.discriminator_counts(step):
            against = generator_loss(logits_fake)
            push = slope_at(reconstruction, against)
            weight = self.adversarial_weight * slope.new_ones(())
            if self.adaptive:
                near, real = (average(pulled_back(each, reconstruction, last_layer)) for each in (slope, push))
                weight = weight * adaptive_weight(near, real, self.adaptive_limit)
            value, slope = value + weight * against, slope + weight * push
            scalars |= {"adversarial": against, "adversarial_weight": weight}
        loss = with_slope(value, slope, reconstruction) + penalty
        return loss, {name: scalar.detach() for name, scalar in {"loss": loss, **scalars}.items()}

    def discriminator(self, logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Scalars]:
        """The discriminator's loss and its terms for the log; its fake pictures are detached reconstructions."""
        loss = self.discriminator_loss(logits_real, logits_fake)
        scalars = {"discriminator": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, {name: scalar.detach() for name, scalar in scalars.items()}
