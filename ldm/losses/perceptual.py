"""How different two pictures look to a frozen network, one number per sample."""

from __future__ import annotations

import copy
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ldm.models.lpips import channel_distances


class Features(Protocol):
    """A network whose maps can be compared."""

    def features(self, x: Tensor) -> list[Tensor]: ...


class FeatureDistance(nn.Module):
    """LPIPS' eq. 1 on another network's feature maps, all channels alike."""

    def __init__(self, network: Features):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.network.features(x), self.network.features(y))
        return torch.stack([channel_distances(a, b).sum(1) for a, b in pairs]).sum(0)  # (B,)


def perceptual(name: Literal["lpips", "judge"], vgg: str | None) -> nn.Module:
    """The distance of that name: LPIPS on VGG16's weights in a file, or the features of the shipped judge."""
    if name == "lpips":
        from ldm.checkpoint.vgg import lpips

        return lpips(vgg)
    from ldm.scenes.pretrained import judge

    return FeatureDistance(copy.deepcopy(judge()))  # a copy, for a loss is moved to devices and precisions
