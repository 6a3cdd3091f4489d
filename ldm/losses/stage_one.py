"""The loss of the first stage: pixels, features, the bottleneck's penalty, and a discriminator (LDM, eq. 25).

CompVis's kl loss sums over an image's values where ours averages; apart from that factor, which Adam does not see, the
objective is the same and its weights keep their numbers: the KL in nats is divided by the number of values too. Two
things differ. Their log-variance is left out: it is a parameter that no optimiser holds. Their clamp of the adaptive
weight at 1e4 acts on the sums, where it binds: `adaptive_limit: 0.0509`, that is 1e4 / (3 * 256 * 256), is the same
clamp here. CompVis's vq loss averages as ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.losses.adversarial import adaptive_weight, generator_loss, hinge, pulled_back, slope_at, vanilla, with_slope
from ldm.losses.perceptual import perceptual as perceptual_distance
from ldm.losses.reconstruction import reconstruction_loss
from ldm.models.quantize import Bottled

Scalars = dict[str, Tensor]
DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def as_it_is(gradient: Tensor) -> Tensor:
    """The mean over ranks where there is one rank."""
    return gradient


class Loss(nn.Module):
    """Both sides of the game; it holds frozen networks only, and a weight of 0 leaves its term out.

    From step `start - warmup` on the discriminator learns, from `start` on the generator feels it.
    """

    def __init__(
        self,
        *,
        penalty_weight: float,  # the bottleneck's: the KL divergence, or the codebook's distance
        l1: float = 1.0,  # weight of absolute differences of pixels
        l2: float = 0.0,  # and of squared ones
        gradient: float = 0.0,  # and of what neighbouring pixels differ by
        perceptual: Literal["lpips", "judge"] = "lpips",  # distance of VGG16's features or the shipped judge's
        perceptual_weight: float = 1.0,  # 0 is none
        vgg: str | None = None,  # file of LPIPS's VGG16; null is where `ldm fetch` puts it
        adversarial: Literal["hinge", "vanilla"] = "hinge",  # loss of the discriminator
        adversarial_weight: float = 0.5,  # 0 is none
        adaptive: bool = True,  # times the ratio of both losses' gradients at the last layer
        adaptive_limit: float = 1e4,  # the largest such ratio
        start: int = 50_001,  # the step from which the generator feels the discriminator
        warmup: int = 0,  # steps before that in which the discriminator learns alone
    ):
        super().__init__()
        check_weights(penalty_weight=penalty_weight, l1=l1, l2=l2, gradient=gradient)
        check_weights(perceptual_weight=perceptual_weight, adversarial_weight=adversarial_weight)
        check_weights(adaptive_limit=adaptive_limit, start=start, warmup=warmup)
        check_choice("perceptual", perceptual, ("lpips", "judge"))
        check_choice("adversarial", adversarial, tuple(DISCRIMINATOR_LOSSES))
        if l1 == l2 == 0:
            raise ValueError("l1: nothing compares the pixels; got 0 and l2 0; expected either above 0; try 1.0")
        self.l1, self.l2, self.gradient, self.penalty_weight = l1, l2, gradient, penalty_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual = perceptual_distance(perceptual, vgg) if perceptual_weight else None
        self.discriminator_loss = DISCRIMINATOR_LOSSES[adversarial]
        self.adversarial_weight, self.adaptive, self.adaptive_limit = adversarial_weight, adaptive, adaptive_limit
        self.start, self.warmup = start, warmup

    def discriminator_learns(self, step: int) -> bool:
        """Whether the discriminator is trained at this step."""
        return self.adversarial_weight > 0 and step >= self.start - self.warmup

    def discriminator_counts(self, step: int) -> bool:
        """Whether the generator's loss has the discriminator's part at this step."""
        return self.adversarial_weight > 0 and step >= self.start

    def distances(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """How far reconstructions are from their images, in pixels and in features, weighted, per sample."""
        pixels = reconstruction_loss(x, reconstruction, self.l1, self.l2, self.gradient)
        if self.perceptual is None:
            return pixels, torch.zeros_like(pixels)
        return pixels, self.perceptual_weight * self.perceptual(x, reconstruction)  # (B,) each

    def penalty(self, bottled: Bottled, x: Tensor) -> Tensor:
        """The weighted penalty per sample: VQ's eq. 3 as it is, the KL in nats per value of the image."""
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
        average: Callable[[Tensor], Tensor] = as_it_is,
    ) -> tuple[Tensor, Scalars]:
        """The autoencoder's loss and its parts to log; `average` takes a gradient's mean over ranks.

        The gradients at the reconstruction are taken here, once; the backward pass goes on from there to the
        autoencoder, and the discriminator gets none.
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
        """The discriminator's loss and its parts to log; its fake pictures are detached reconstructions."""
        loss = self.discriminator_loss(logits_real, logits_fake)
        scalars = {"discriminator": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, {name: scalar.detach() for name, scalar in scalars.items()}


def check_weights(**numbers: float) -> None:
    """Refuse negative numbers."""
    for argument, value in numbers.items():
        if value < 0:
            raise ValueError(f"{argument}: is never negative; got {value}; expected 0 or more; try 0")


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Refuse names that are not there."""
    if value not in choices:
        expected = " or ".join(choices)
        raise ValueError(f"{argument}: there is no such loss; got {value}; expected {expected}; try {choices[0]}")
