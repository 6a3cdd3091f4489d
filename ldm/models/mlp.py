"""A small residual network for points: the smallest backbone, used by the demo and in tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """x (B, C) and t (B,) -> (B, C), by `layers` residual blocks that are told the time."""

    def __init__(self, *, channels: int, width: int = 128, layers: int = 3):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width: must be even and at least 2, got {width}")
        if layers < 1:
            raise ValueError(f"layers: must be at least 1, got {layers}")
        self.width = width
        self.inward = nn.Linear(channels, width)
        self.time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.outward = nn.Linear(width, channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The backbone's contract in its plainest form."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(self.width // 2, device=t.device) / (self.width // 2))
        phase = t[:, None] * frequencies  # (B, W / 2)
        told = self.time(torch.cat([phase.cos(), phase.sin()], dim=1))  # (B, W)
        x = self.inward(x)  # (B, W)
        for block in self.blocks:
            x = x + block(x + told)  # (B, W)
        return self.outward(x)  # (B, C)
