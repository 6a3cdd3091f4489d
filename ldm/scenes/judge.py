"""The judge: a small network that detects the objects in a picture of a scene; its features compare pictures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import group_norm

SIDE, CELLS = 64, 32  # its input is 64 x 64 pixels, its output 32 x 32 cells
CANDIDATES = 6  # per picture
KINDS = (4, 8, 2, 2)  # of shapes, colours, materials, sizes
WIDTH, GROUPS, QUERY = 32, 8, 16


class Detections(NamedTuple):
    """K candidates per picture, the highest score first, with the probabilities of their attributes."""

    score: Tensor  # (B, K) probability that there is an object
    shape: Tensor  # (B, K, shapes)
    colour: Tensor  # (B, K, colours)
    material: Tensor  # (B, K, materials)
    size: Tensor  # (B, K, sizes)
    centre: Tensor  # (B, K, 2) x and y of its visible part, 0 to 1 from the picture's left and top
    place: Tensor  # (B, K, 3) to the right, away and up, in world units from the camera's point of view
    mask: Tensor  # (B, K, 32, 32) probability that a cell shows the object


class Maps(NamedTuple):
    """The network's output for every cell; detections are read from the cells with an object's centre."""

    score: Tensor  # (B, 32, 32) logits
    shape: Tensor  # (B, 32, 32, shapes) logits, as the next three
    colour: Tensor
    material: Tensor
    size: Tensor
    offset: Tensor  # (B, 32, 32, 2) from the cell's corner to the centre, in cells
    place: Tensor  # (B, 32, 32, 3)
    query: Tensor  # (B, 32, 32, Q) whose product with `pixels` is the object's mask
    pixels: Tensor  # (B, Q, 32, 32)

    def mask(self, query: Tensor) -> Tensor:
        """Mask logits (B, K, 32, 32) of objects with these queries (B, K, Q)."""
        return torch.einsum("bkq,bqhw->bkhw", query, self.pixels)

    def detections(self) -> Detections:
        """The highest peaks of the score, each with the outputs of its cell."""
        score = self.score.sigmoid()[:, None]  # (B, 1, 32, 32)
        peaks = (score * (score == F.max_pool2d(score, 5, 1, 2))).flatten(1)  # (B, 1024)
        score, cell = peaks.topk(CANDIDATES)  # (B, K)
        corner = torch.stack((cell % CELLS, cell // CELLS), -1)  # (B, K, 2)
        shape, colour, material, size = (take(x, cell).softmax(-1) for x in self[1:5])
        centre = (corner + take(self.offset, cell)) / CELLS
        mask = self.mask(take(self.query, cell)).sigmoid()
        return Detections(score, shape, colour, material, size, centre, take(self.place, cell), mask)


def take(x: Tensor, cell: Tensor) -> Tensor:
    """The values (B, K, C) of a map (B, 32, 32, C) in cells (B, K), which are counted row by row."""
    return x.flatten(1, 2).take_along_dim(cell[..., None], 1)


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = group_norm(channels, 1e-5, GROUPS)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels, 1e-5, GROUPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        return x + self.conv2(F.silu(self.norm2(h)))  # (B, C, H, W)


class Judge(nn.Module):
    """Objects are peaks of a score map (CenterNet, Zhou et al., 2019); a mask is the product of an object's query with
    features of each cell (YOLACT, Bolya et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        half, quarter, eighth = WIDTH, 2 * WIDTH, 4 * WIDTH  # by resolution
        self.stages = nn.ModuleList([down(3, half, 1), down(half, quarter, 1), down(quarter, eighth, 2)])
        self.up = nn.ModuleList([nn.Conv2d(eighth, quarter, 1), nn.Conv2d(quarter, half, 1)])
        self.join = Block(quarter)
        self.widths = [1, *KINDS, 2, 3, QUERY, QUERY]  # of Maps
        self.cells = nn.Sequential(
            nn.SiLU(), nn.Conv2d(half, half, 3, padding=1), nn.SiLU(), nn.Conv2d(half, sum(self.widths), 1)
        )

    def forward(self, x: Tensor) -> Detections:
        """Objects in pictures (B, 3, H, W) in [-1, 1] of any size."""
        return self.maps(x).detections()

    def maps(self, x: Tensor) -> Maps:
        """The outputs of all cells, in float32."""
        half, quarter, eighth = self.features(resized(x))  # (B, 32, 32, 32), (B, 64, 16, 16), (B, 128, 8, 8)
        h = self.join(quarter + double(self.up[0](F.silu(eighth))))  # (B, 64, 16, 16)
        h = self.cells(half + double(self.up[1](F.silu(h)))).float()  # (B, sum of widths, 32, 32)
        *cells, pixels = h.split(self.widths, 1)
        score, *others = (each.permute(0, 2, 3, 1) for each in cells)
        return Maps._make([score[..., 0], *others, pixels])

    def features(self, x: Tensor) -> list[Tensor]:
        """Features at 1/2, 1/4 and 1/8 of the input's size, for a perceptual loss."""
        maps = []
        for stage in self.stages:
            x = stage(x)  # (B, C, H/2, W/2), then (B, 2C, H/4, W/4) and (B, 4C, H/8, W/8)
            maps.append(x)
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """(B, 192) spatially averaged features, for Frechet distances."""
        return torch.cat([each.mean((2, 3)) for each in self.features(resized(x))[1:]], 1)


def down(inward: int, outward: int, blocks: int) -> nn.Sequential:
    """A convolution that halves height and width, then residual blocks."""
    return nn.Sequential(nn.Conv2d(inward, outward, 3, stride=2, padding=1), *(Block(outward) for _ in range(blocks)))


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def resized(x: Tensor) -> Tensor:
    """Pictures resized to the judge's input size."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"x: not pictures; got shape {tuple(x.shape)}; expected (B, 3, H, W); try x[None]")
    if x.shape[2:] == (SIDE, SIDE):
        return x
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
