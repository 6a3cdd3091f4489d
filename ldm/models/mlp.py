"""A small residual network for points: the smallest backbone, used by the demo and in tests."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.models.layers import check_multiple, check_positive, timestep_embedding


class MLP(nn.Module):
    """x (B, C), t (B,) -> (B, C), or (B, 2C) with `learned_sigma`, by residual blocks on x plus the time."""

    def __init__(
        self,
        *,
        in_channels: int,
        learned_sigma: bool = False,
        width: int = 128,  # of its layers
        layers: int = 3,  # between the first and the last
    ):
        super().__init__()
        check_multiple("width", width, 2, "needs a cosine for each sine")
        check_positive(layers=layers)
        self.width = width
        self.inward = nn.Linear(in_channels, width)
        self.time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.outward = nn.Linear(width, in_channels * (2 if learned_sigma else 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(timestep_embedding(t, self.width))  # (B, W)
        x = self.inward(x)  # (B, W)
        for block in self.blocks:
            x = x + block(x + time)  # (B, W)
        return self.outward(x)  # (B, C or 2C)
