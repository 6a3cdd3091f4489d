"""A table of scenes as tensors: everything that rays, shadows and colours depend on.

Vectors are (3, N), so that each coordinate is contiguous. Sines and roots that are constant over an object are computed
here, once, in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.scenes.description import HALF_HEIGHT, HALF_WIDTH, MATERIALS, SHAPES, Floats, Table
from ldm.scenes.relations import FOCAL, View, view

QUARTER = 90.0  # degrees that the light turns per unit of time
ALBEDO = np.array(  # linear light; the picture stores its square root
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


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """values[..., rows]; index_select is several times as fast as indexing."""
    return values.index_select(-1, rows.reshape(-1)).reshape(*values.shape[:-1], *rows.shape)


class Solid(NamedTuple):
    """N objects."""

    centre: Tensor  # (3, N)
    turn: Tensor  # (2, N) cosine and sine
    width: Tensor  # (N,) half of the width
    height: Tensor  # (N,) half of the height
    albedo: Tensor  # (3, N)
    shiny: Tensor  # (N,) 0 or 1

    def local(self, p: Tensor) -> Tensor:
        """A direction (3, ...) of the world in the object's frame."""
        cos, sin = self.turn
        return torch.stack((p[0] * cos + p[1] * sin, p[1] * cos - p[0] * sin, p[2].expand_as(p[0] * cos)))

    def world(self, p: Tensor) -> Tensor:
        """A direction (3, ...) of the object's frame in the world."""
        cos, sin = self.turn
        return torch.stack((p[0] * cos - p[1] * sin, p[0] * sin + p[1] * cos, p[2]))


class World(NamedTuple):
    """B scenes of three places each; empty places have shape -1."""

    eye: Tensor  # (3, B)
    right: Tensor
    up: Tensor
    forward: Tensor
    light: Tensor  # (3, B) towards it
    floor: Tensor  # (B,)
    body: Tensor  # (11, B * 3) the rows of Solid
    outline: Tensor  # (12, B * 3) see shapes.box_outline and shapes.round_outline
    shape: Tensor  # (B * 3,)
    box: Tensor  # (4, B * 3) left, top, right, bottom in the picture, from 0 to 1, around the whole object

    @property
    def axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The axes of the cameras."""
        return self.right, self.up, self.forward

    def solid(self, index: Tensor) -> Solid:
        """The objects with these indices, which may repeat."""
        rows = pick(self.body, index)
        return Solid(rows[:3], rows[3:5], rows[5], rows[6], rows[7:10], rows[10])

    def take(self, rows: slice) -> World:
        """A slice of the scenes."""
        objects = slice(rows.start * 3, rows.stop * 3)
        return World._make([*(field[..., rows] for field in self[:6]), *(field[..., objects] for field in self[6:])])


def to_world(table: Table, device: torch.device | str) -> World:
    """A table as tensors."""

    def tensor(array: NDArray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

    at = view(table)
    azimuth, elevation = np.radians(table.light[:, 0] + QUARTER * table.time), np.radians(table.light[:, 1])
    light = np.stack((np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)))
    turn = np.radians(np.where(table.shape == SHAPES.index("cube"), table.turn, 0.0))  # the other shapes are round
    return World(
        *(tensor(at.eye.T), tensor(at.right.T), tensor(at.up.T), tensor(at.forward.T), tensor(light)),
        tensor(table.floor, torch.int64),
        tensor(_body(table, turn).reshape(11, -1)),
        tensor(_outline(table, turn, light[:, :, None]).reshape(12, -1)),
        tensor(table.shape.reshape(-1), torch.int64),
        tensor(_boxes(table, turn, at).reshape(4, -1)),
    )


def _body(table: Table, turn: Floats) -> Floats:
    """(11, B, 3) in the order of Solid's fields."""
    rows = [table.x, table.y, table.z, np.cos(turn), np.sin(turn), table.extent(HALF_WIDTH), table.extent(HALF_HEIGHT)]
    rows += [ALBEDO[table.colour][..., i] for i in range(3)]
    return np.stack([*rows, (table.material == MATERIALS.index("shiny")).astype(np.float64)])


def _outline(table: Table, turn: Floats, light: Floats) -> Floats:
    """(12, B, 3) the shape of each object seen along the light (3, B, 1)."""
    box = table.shape == SHAPES.index("cube")
    return np.where(box, _box_outline(turn, light, table.extent(HALF_WIDTH)), _round_outline(table, light))


def _box_outline(turn: Floats, light: Floats, width: Floats) -> Floats:
    """Three directions across the light, parallel to the sides of the hexagon, and the distances of those sides."""
    light = np.broadcast_to(light, (3, *turn.shape))
    zero, one = np.zeros_like(turn), np.ones_like(turn)
    cos, sin = np.cos(turn), np.sin(turn)
    axes = [np.stack(axis) for axis in ((cos, sin, zero), (-sin, cos, zero), (zero, zero, one))]
    sides = [np.cross(light, axis, axis=0) for axis in axes]
    sides = [side / np.linalg.norm(side, axis=0) for side in sides]
    reach = [sum(np.abs((axis * side).sum(0)) for axis in axes) * width for side in sides]
    return np.concatenate([*sides, np.stack(reach)])


def _round_outline(table: Table, light: Floats) -> Floats:
    """Two directions across the light, the second along the axis; the hull of two circles on it, and its side's slant.

    A circle round the axis is seen as an ellipse; the second direction is stretched so that it is a circle again.
    """
    width, height = table.extent(HALF_WIDTH), table.extent(HALF_HEIGHT)
    ball, cone = table.shape == SHAPES.index("sphere"), table.shape == SHAPES.index("cone")
    flat = np.hypot(light[0], light[1])
    stretch = np.where(ball, 1.0, 1 / light[2])
    across = [light[1] / flat * np.ones_like(width), -light[0] / flat * np.ones_like(width), np.zeros_like(width)]
    along = [-light[0] * light[2] / flat * stretch, -light[1] * light[2] / flat * stretch, flat * stretch]
    half = np.where(ball, 0.0, height * flat * stretch)
    low, high = width, np.where(cone, 0.0, width)
    slant = (low - high) / np.maximum(2 * half, 1e-6)
    upright = np.sqrt(np.maximum(1 - slant**2, 0))
    return np.stack([*across, *along, -half, 2 * half, low, high, slant, upright])


def _boxes(table: Table, turn: Floats, at: View) -> Floats:
    """(4, B, 3) bounds of the projected corners of a box round each object."""
    cos, sin = np.cos(turn)[..., None], np.sin(turn)[..., None]
    x, y, z = (
        table.extent(by)[..., None] * CORNERS[:, i] for i, by in enumerate((HALF_WIDTH, HALF_WIDTH, HALF_HEIGHT))
    )
    x, y = x * cos - y * sin + table.x[..., None], x * sin + y * cos + table.y[..., None]  # (B, 3, corners)
    corner = np.stack([x, y, z + table.z[..., None]], -1) - at.eye[:, None, None]
    across, up, depth = (np.einsum("bokc,bc->bok", corner, axis) for axis in at[1:])
    across, down = 0.5 + 0.5 * FOCAL * across / depth, 0.5 - 0.5 * FOCAL * up / depth
    return np.stack([across.min(2), down.min(2), across.max(2), down.max(2)])
