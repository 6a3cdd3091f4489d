"""The camera's view of a table of scenes, and the relations between objects in that view."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.scenes.description import HALF_HEIGHT, OBJECTS, REACH, Floats, Scene, Table

RELATIONS = ("left of", "right of", "in front of", "behind", "on top of")
MARGIN = 0.6  # world units, about a ninth of the picture's width
SLANT = 0.5  # the distance along a relation's axis is at least this share of the distance across it
LOOKS_AT = 0.5  # height above the middle of the table
FOCAL = 3.4  # focal length over half of the picture's width


class View(NamedTuple):
    """The eye and the axes of the camera in the world, each (B, 3)."""

    eye: Floats
    right: Floats
    up: Floats
    forward: Floats


def view(table: Table) -> View:
    """Position and orientation of each camera."""
    azimuth, elevation = np.radians(table.camera[:, 0]), np.radians(table.camera[:, 1])
    zero = np.zeros_like(azimuth)
    right = np.stack([np.cos(azimuth), np.sin(azimuth), zero], 1)
    level = np.stack([-np.sin(azimuth), np.cos(azimuth), zero], 1)  # forward, along the floor
    up = level * np.sin(elevation)[:, None] + [0, 0, 1] * np.cos(elevation)[:, None]
    forward = level * np.cos(elevation)[:, None] - [0, 0, 1] * np.sin(elevation)[:, None]
    eye = [0, 0, LOOKS_AT] - forward * table.camera[:, 2:]
    return View(eye, right, up, forward)


def project(table: Table, at: View) -> tuple[Floats, Floats, Floats]:
    """Right, up (-1 to 1 inside the picture) and depth of the objects' centres, each (B, 3)."""
    centre = np.stack([table.x, table.y, table.z], 2)  # (B, objects, 3)
    seen = [np.einsum("bok,bk->bo", centre - at.eye[:, None], axis) for axis in (at.right, at.up, at.forward)]
    return FOCAL * seen[0] / seen[2], FOCAL * seen[1] / seen[2], seen[2]


def stands_on(table: Table) -> NDArray[np.bool_]:
    """(B, i, j) True if object i stands on object j."""
    half = table.extent(HALF_HEIGHT)
    touch = np.abs((table.z - half)[:, :, None] - (table.z + half)[:, None]) < 1e-6
    apart = np.hypot(table.x[:, :, None] - table.x[:, None], table.y[:, :, None] - table.y[:, None])
    return touch & (apart < table.extent(REACH)[:, None]) & table.there[:, :, None] & table.there[:, None]


def related(table: Table) -> NDArray[np.bool_]:
    """(B, relation, i, j) True if object i is seen left of, right of, in front of, behind or on top of object j."""
    at = view(table)
    across = project(table, at)[0] * (table.camera[:, 2:] / FOCAL)  # in the picture, in world units at its middle
    azimuth = np.radians(table.camera[:, 0, None])
    away = table.y * np.cos(azimuth) - table.x * np.sin(azimuth)  # along the floor
    dx = across[:, None] - across[:, :, None]  # from i to j
    dy = away[:, None] - away[:, :, None]
    on = stands_on(table)
    free = table.there[:, :, None] & table.there[:, None] & ~on & ~on.swapaxes(1, 2) & ~np.eye(OBJECTS, dtype=bool)
    left, front = dx > np.maximum(MARGIN, SLANT * np.abs(dy)), dy > np.maximum(MARGIN, SLANT * np.abs(dx))
    pairs = [left, left.swapaxes(1, 2), front, front.swapaxes(1, 2)]
    return np.stack([free & pair for pair in pairs] + [on], 1)


def relations(scene: Scene) -> set[tuple[int, str, int]]:
    """Every (i, relation, j) that visibly holds."""
    return {(int(i), RELATIONS[r], int(j)) for r, i, j in np.argwhere(related(Table.of([scene]))[0])}
