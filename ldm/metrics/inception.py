"""Inception v3 of FID (Szegedy et al. 2015, TensorFlow's weights of 2015): torchvision's, with TensorFlow's pools."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

CLASSES = 1008
SPATIAL = 7  # channels of the 17 x 17 map for sFID (Nash et al. 2021)


class Pooled(nn.Module):
    """A block whose last branch has another pool than torchvision's; by default a mean over pixels inside the map."""

    branch_pool: nn.Module
    pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        last = self.branch_pool(self.pool(x))  # (B, C', h, w)
        return torch.cat((super().forward(x)[:, : -last.shape[1]], last), 1)  # (B, C, h, w)


class BlockA(Pooled, inception.InceptionA):
    """A block on the 35 x 35 map."""


class BlockC(Pooled, inception.InceptionC):
    """A block on the 17 x 17 map with 7 x 1 and 1 x 7 convolutions."""


class BlockE(Pooled, inception.InceptionE):
    """A block on the 8 x 8 map, whose branches fork."""


class Inception(inception.Inception3):
    """Pictures (B, 3, 299, 299) in [-1, 1] to the inputs of FID, sFID and the Inception score."""

    def __init__(self) -> None:
        blocks = [inception.BasicConv2d, BlockA, inception.InceptionB, BlockC, inception.InceptionD, BlockE, None]
        super().__init__(CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL].flatten(1)  # (B, 2023)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean((2, 3))  # (B, 2048)
        return pooled, spatial, pooled @ self.fc.weight.T  # (B, 1008), without bias, as in the Inception score
