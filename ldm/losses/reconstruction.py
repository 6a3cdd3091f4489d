"""Pixel losses of the first stage, one number per sample."""

from __future__ import annotations

from torch import Tensor

from ldm.condition import at_least_float32


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
