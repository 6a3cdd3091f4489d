"""Perceptual distances of pictures by a frozen network, one number per sample."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoint.vgg import lpips
from ldm.config import parts
from ldm.models.lpips import channel_distances


class FeatureDistance(nn.Module):
    """LPIPS' eq. 1 on another network's `features(x) -> list[Tensor]`, with equal weights of all channels."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.network.features(x), self.network.features(y))
        return torch.stack([channel_distances(a, b).sum(1) for a, b in pairs]).sum(0)  # (B,)


def perceptual(name: Literal["lpips", "judge"], vgg: str | None) -> nn.Module:
    """LPIPS with VGG16's weights from a file, or the distance of the shipped judge's features."""
    if name == "lpips":
        return lpips(vgg)
    judge = parts.load(parts.SHIPPED["judge"])()
    return FeatureDistance(copy.deepcopy(judge))  # a copy, because a loss is moved and cast
