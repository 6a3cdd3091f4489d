"""A table of scenes as tensors: what a ray, a shadow or a colour needs to know of each object and each scene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.scenes.description import HALF_HEIGHT, HALF_WIDTH, MATERIALS, SHAPES, Table
from ldm.data.scenes.relations import FOCAL, View, view

QUARTER = 90.0  # degrees that the light goes round in a unit of time
# linear light; the picture shows square roots
ALBEDO = np.array(
    [
        (0.62, 0.025, 0.025),  # red
        (0.03, 0.34, 0.045),  # green
        (0.025, 0.09, 0.70),  # blue
        (0.86, 0.66, 0.03),  # yellow
        (0.28, 0.04, 0.50),  # purple
        (0.90, 0.25, 0.02),  # orange
        (0.04, 0.58, 0.62),  # cyan
        (0.16, 0.16, 0.16),  # gray
    ]
)
CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])


class Solid(NamedTuple):
    """Objects, one per last place; (3, N), (2, N) or (N,)."""

    centre: Tensor  # (3, N)
    turn: Tensor  # (2, N) cosine and sine
    width: Tensor  # half of it, as the next
    height: Tensor
    albedo: Tensor  # (3, N)
    shiny: Tensor  # 0 or 1
    bottom: Tensor  # of the outline: see shapes.round_outline
    length: Tensor
    low: Tensor
    high: Tensor
    ball: Tensor  # 0 or 1

    def local(self, p: Tensor) -> Tensor:
        """A direction (3, ...) in the object's own frame."""
        cos, sin = self.turn
        return torch.stack((p[0] * cos + p[1] * sin, p[1] * cos - p[0] * sin, p[2] * torch.ones_like(cos)))

    def world(self, p: Tensor) -> Tensor:
        """The way back."""
        cos, sin = self.turn
        return torch.stack((p[0] * cos - p[1] * sin, p[0] * sin + p[1] * cos, p[2]))


class World(NamedTuple):
    """Scenes as tensors: (3, B) for vectors, B * 3 objects, those that are not there with shape -1."""

    eye: Tensor
    right: Tensor
    up: Tensor
    forward: Tensor
    light: Tensor  # (3, B) towards it
    floor: Tensor  # (B,)
    packed: Tensor  # (16, B * 3) a Solid's rows
    shape: Tensor  # (B * 3,)
    box: Tensor  # (4, B * 3) left, top, right, bottom in the picture, from 0 to 1; nothing lies beyond

    def solid(self, index: Tensor) -> Solid:
        """The objects of these numbers; one number may come often."""
        return unpacked(self.packed[:, index])

    def take(self, rows: slice) -> World:
        """The scenes from here to there."""
        three = slice(rows.start * 3, rows.stop * 3)
        scenes = (field[..., rows] for field in self[:6])
        return World(*scenes, *(field[..., three] for field in self[6:]))


def unpacked(rows: Tensor) -> Solid:
    """(16, ...) as names."""
    return Solid(rows[:3], rows[3:5], rows[5], rows[6], rows[7:10], *rows[10:])


def world(table: Table, device: torch.device | str) -> World:
    """A table as tensors; sines and cosines are taken here, once, in float64."""

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

    at = view(table)
    azimuth, elevation = np.radians(table.light[:, 0] + QUARTER * table.time), np.radians(table.light[:, 1])
    light = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    return World(
        *(tensor(axis.T) for axis in at),
        tensor(np.stack(light)),
        tensor(table.floor, torch.int64),
        tensor(_packed(table)),
        tensor(table.shape.reshape(-1), torch.int64),
        tensor(_boxes(table, at).reshape(4, -1)),
    )


def _packed(table: Table) -> np.ndarray:
    """(16, B * 3), in the order of Solid's fields."""
    width, height = table.extent(HALF_WIDTH), table.extent(HALF_HEIGHT)
    turn = np.radians(np.where(table.shape == SHAPES.index("cube"), table.turn, 0.0))  # the others are round
    ball, cone = table.shape == SHAPES.index("sphere"), table.shape == SHAPES.index("cone")
    rows = [table.x, table.y, table.z, np.cos(turn), np.sin(turn), width, height]
    rows += [ALBEDO[table.colour][..., i] for i in range(3)]
    rows += [table.material == MATERIALS.index("shiny"), np.where(ball, 0, -height), np.where(ball, 0, 2 * height)]
    rows += [width, np.where(cone, 0, width), ball]
    return np.stack(rows).astype(np.float64).reshape(len(rows), -1)


def _boxes(table: Table, at: View) -> np.ndarray:
    """(4, B, 3) what holds the projected corners of a box round each object."""
    turn = np.radians(table.turn)
    cos, sin = np.cos(turn)[..., None], np.sin(turn)[..., None]
    x, y, z = np.moveaxis(CORNERS * np.stack([table.extent(by) for by in (HALF_WIDTH, HALF_WIDTH, HALF_HEIGHT)], 2)[:, :, None], -1, 0)
    x, y = x * cos - y * sin, x * sin + y * cos  # (B, 3, corners)
    corner = np.stack([x + table.x[..., None], y + table.y[..., None], z + table.z[..., None]], -1)
    across, up, depth = (np.einsum("bokc,bc->bok", corner - at.eye[:, None, None], axis) for axis in at[1:])
    across, down = 0.5 + 0.5 * FOCAL * across / depth, 0.5 - 0.5 * FOCAL * up / depth
    return np.stack([across.min(2), down.min(2), across.max(2), down.max(2)])
