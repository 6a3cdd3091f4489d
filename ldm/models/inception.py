"""Inception v3 of FID (Szegedy et al. 2015, TensorFlow's weights of 2015); module names are those of the file."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, CLASSES = 299, 1008
SPATIAL = 7  # channels of the 17 x 17 map for sFID (Nash et al. 2021)


class Activations(NamedTuple):
    """Inception's outputs for a batch."""

    pooled: Tensor  # (B, 2048)
    spatial: Tensor  # (B, 7 * 17 * 17)
    logits: Tensor  # (B, 1008), without bias, as in the Inception score


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inside: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: object = 0):
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def square(inside: int, out: int, side: int) -> Conv:
    """A square convolution that keeps the map's size."""
    return Conv(inside, out, side, padding=side // 2)


def wide(inside: int, out: int, width: int) -> Conv:
    """A 1 x width convolution that keeps the map's size."""
    return Conv(inside, out, (1, width), padding=(0, width // 2))


def tall(inside: int, out: int, height: int) -> Conv:
    """A height x 1 convolution that keeps the map's size."""
    return Conv(inside, out, (height, 1), padding=(height // 2, 0))


def average(x: Tensor) -> Tensor:
    """The mean of 3 x 3 neighbours inside the map, as in TensorFlow."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Mixed(nn.Module):
    """Parallel branches: each is a chain of convolutions by name, the last of which may fork in two.

    `pool` is "average" or "max" before `branch_pool`, or "halve" for the branch of a block that halves the map.
    """

    def __init__(self, pool: str, chains: list[list[str]], **convolutions: Conv):
        super().__init__()
        self.pool, self.chains = pool, chains
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)

    def forward(self, x: Tensor) -> Tensor:
        found = [h for chain in self.chains for h in self.chain(x, chain)]
        if self.pool == "halve":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        pooled = average(x) if self.pool == "average" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*found, self.get_submodule("branch_pool")(pooled)], 1)

    def chain(self, x: Tensor, names: list[str]) -> list[Tensor]:
        """One branch; names that end in `a` and `b` have the same input."""
        *chain, last = names
        for name in chain:
            x = self.get_submodule(name)(x)
        ends = [f"{last}a", f"{last}b"] if hasattr(self, f"{last}a") else [last]
        return [self.get_submodule(end)(x) for end in ends]


def numbered(name: str, count: int) -> list[str]:
    """name_1 to name_count."""
    return [f"{name}_{i}" for i in range(1, count + 1)]


def block_a(inside: int, pooled: int) -> Mixed:
    """A block on the 35 x 35 map."""
    return Mixed(
        "average",
        [["branch1x1"], numbered("branch5x5", 2), numbered("branch3x3dbl", 3)],
        branch1x1=square(inside, 64, 1),
        branch5x5_1=square(inside, 48, 1),
        branch5x5_2=square(48, 64, 5),
        branch3x3dbl_1=square(inside, 64, 1),
        branch3x3dbl_2=square(64, 96, 3),
        branch3x3dbl_3=square(96, 96, 3),
        branch_pool=square(inside, pooled, 1),
    )


def block_b(inside: int) -> Mixed:
    """The block from 35 x 35 to 17 x 17."""
    return Mixed(
        "halve",
        [["branch3x3"], numbered("branch3x3dbl", 3)],
        branch3x3=Conv(inside, 384, 3, 2),
        branch3x3dbl_1=square(inside, 64, 1),
        branch3x3dbl_2=square(64, 96, 3),
        branch3x3dbl_3=Conv(96, 96, 3, 2),
    )


def block_c(width: int) -> Mixed:
    """A block on the 17 x 17 map with 7 x 1 and 1 x 7 convolutions."""
    return Mixed(
        "average",
        [["branch1x1"], numbered("branch7x7", 3), numbered("branch7x7dbl", 5)],
        branch1x1=square(768, 192, 1),
        branch7x7_1=square(768, width, 1),
        branch7x7_2=wide(width, width, 7),
        branch7x7_3=tall(width, 192, 7),
        branch7x7dbl_1=square(768, width, 1),
        branch7x7dbl_2=tall(width, width, 7),
        branch7x7dbl_3=wide(width, width, 7),
        branch7x7dbl_4=tall(width, width, 7),
        branch7x7dbl_5=wide(width, 192, 7),
        branch_pool=square(768, 192, 1),
    )


def block_d() -> Mixed:
    """The block from 17 x 17 to 8 x 8."""
    return Mixed(
        "halve",
        [numbered("branch3x3", 2), numbered("branch7x7x3", 4)],
        branch3x3_1=square(768, 192, 1),
        branch3x3_2=Conv(192, 320, 3, 2),
        branch7x7x3_1=square(768, 192, 1),
        branch7x7x3_2=wide(192, 192, 7),
        branch7x7x3_3=tall(192, 192, 7),
        branch7x7x3_4=Conv(192, 192, 3, 2),
    )


def block_e(inside: int, pool: str) -> Mixed:
    """A block on the 8 x 8 map, whose branches fork."""
    return Mixed(
        pool,
        [["branch1x1"], ["branch3x3_1", "branch3x3_2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]],
        branch1x1=square(inside, 320, 1),
        branch3x3_1=square(inside, 384, 1),
        branch3x3_2a=wide(384, 384, 3),
        branch3x3_2b=tall(384, 384, 3),
        branch3x3dbl_1=square(inside, 448, 1),
        branch3x3dbl_2=square(448, 384, 3),
        branch3x3dbl_3a=wide(384, 384, 3),
        branch3x3dbl_3b=tall(384, 384, 3),
        branch_pool=square(inside, 192, 1),
    )


class Inception(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] to the inputs of FID, sFID and the Inception score."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = square(32, 64, 3)
        self.Conv2d_3b_1x1 = square(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_c(n) for n in (128, 160, 160, 192))
        self.Mixed_7a = block_d()
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> Activations:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL].flatten(1)  # (B, 2023)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean((2, 3))  # (B, 2048)
        return Activations(pooled, spatial, pooled @ self.fc.weight.T)
