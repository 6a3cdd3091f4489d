"""Rays from the camera, and which object each of them meets first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.scenes import shapes
from ldm.scenes.description import OBJECTS
from ldm.scenes.relations import FOCAL
from ldm.scenes.shapes import NOWHERE
from ldm.scenes.solids import World, pick

RAYS = 4  # to each side of a pixel in which an object may be
MEET = (shapes.sphere, shapes.cube, shapes.cylinder, shapes.cone)  # in the order of SHAPES


class Hits(NamedTuple):
    """What the S = RAYS^2 rays meet of each of the M pixels in which objects may be; the others show floor."""

    scene: Tensor  # (M,)
    pixel: Tensor  # (M,) row by row
    ray: Tensor  # (3, M, S) one long along the camera's axis, so that t is depth
    depth: Tensor  # (M, S)
    slot: Tensor  # (M, S) which object, if any
    hit: Tensor  # (M, S) whether it is one


def centres(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right and up, from -1 to 1, of pixels row by row, each (size^2,)."""
    place = (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1 - size) / size
    return place.repeat(size), (-place).repeat_interleave(size)


def directions(axes: Sequence[Tensor], across: Tensor, up: Tensor) -> Tensor:
    """(3, B, P) rays of cameras (B) through these places of the picture, (P,) or (B, P)."""
    right, upward, forward = (axis[:, :, None] for axis in axes)
    return forward + right * (across / FOCAL) + upward * (up / FOCAL)


def meet(some: World, size: int) -> Hits:
    """Send rays where objects may be, and keep the nearest of what each meets."""
    inside = _inside(some, size)  # (B, 3, P)
    scene, pixel = inside.any(1).nonzero().unbind(1)  # (M,)
    x, y = (pick(place, pixel)[:, None] for place in centres(size, inside.device))
    step = (torch.arange(RAYS, device=inside.device, dtype=torch.float32) * 2 + 1 - RAYS) / (RAYS * size)
    axes = [pick(axis, scene) for axis in some.axes]
    ray = directions(axes, x + step.repeat(RAYS), y - step.repeat_interleave(RAYS))  # (3, M, S)
    depth, slot = torch.full_like(ray[0], NOWHERE), torch.zeros_like(ray[0], dtype=torch.int64)
    for i in range(OBJECTS):
        shape = torch.where(inside[:, i].reshape(-1).index_select(0, scene * size**2 + pixel), 0, -OBJECTS)
        found = _meet_one(some, shape + pick(some.shape, scene * OBJECTS + i), scene, i, ray)
        slot = torch.where(found < depth, i, slot)
        depth = torch.minimum(depth, found)
    return Hits(scene, pixel, ray, depth, slot, depth < NOWHERE)


def _inside(some: World, size: int) -> Tensor:
    """(B, 3, P) the pixels that touch each object's box."""
    edges = torch.arange(size, device=some.box.device)
    left, top, right, bottom = (some.box * size)[:, :, None]
    across = (edges + 1 > left) & (edges < right)  # (B * 3, W)
    down = (edges + 1 > top) & (edges < bottom) & (some.shape >= 0)[:, None]
    return (down[:, :, None] & across[:, None]).reshape(-1, OBJECTS, size**2)


def _meet_one(some: World, shape: Tensor, scene: Tensor, slot: int, ray: Tensor) -> Tensor:
    """(M, S) where rays meet the object in this slot, whose shape (M,) is negative where it is not."""
    found = torch.full_like(ray[0], NOWHERE)
    for i, within in enumerate(MEET):
        rows = (shape == i).nonzero()[:, 0]
        there = scene[rows]
        solid = some.solid(there[:, None] * OBJECTS + slot)
        origin = solid.local(pick(some.eye, there)[:, :, None] - solid.centre)
        start, end = within(origin, solid.local(ray.index_select(1, rows)), solid.width, solid.height)
        found[rows] = torch.where(start < end, start, NOWHERE)
    return found
