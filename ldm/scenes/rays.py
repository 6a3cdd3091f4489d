"""Rays from the camera, and the first object that each of them meets."""

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

RAYS = 4  # per side of a pixel that may show an object
MEET = (shapes.sphere, shapes.cube, shapes.cylinder, shapes.cone)  # in the order of SHAPES


class Hits(NamedTuple):
    """The hits of the S = RAYS^2 rays of each of the M pixels that may show objects; other pixels show floor."""

    scene: Tensor  # (M,)
    pixel: Tensor  # (M,) index, row by row
    ray: Tensor  # (3, M, S) of length one along the camera's axis, so that t is depth
    depth: Tensor  # (M, S)
    slot: Tensor  # (M, S) index of the object, if any
    hit: Tensor  # (M, S) True if there is one


def centres(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres, right and up from -1 to 1, row by row, each (size^2,)."""
    place = (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1 - size) / size
    return place.repeat(size), (-place).repeat_interleave(size)


def directions(axes: Sequence[Tensor], across: Tensor, up: Tensor) -> Tensor:
    """(3, B, P) rays of the cameras (B) through points of the picture, (P,) or (B, P)."""
    right, upward, forward = (axis[:, :, None] for axis in axes)
    return forward + right * (across / FOCAL) + upward * (up / FOCAL)


def meet(world: World, size: int) -> Hits:
    """Send rays where objects may be, and keep the nearest hit of each."""
    inside = _inside(world, size)  # (B, 3, P)
    scene, pixel = inside.any(1).nonzero().unbind(1)  # (M,)
    x, y = (pick(place, pixel)[:, None] for place in centres(size, inside.device))
    step = (torch.arange(RAYS, device=inside.device, dtype=torch.float32) * 2 + 1 - RAYS) / (RAYS * size)
    axes = [pick(axis, scene) for axis in world.axes]
    ray = directions(axes, x + step.repeat(RAYS), y - step.repeat_interleave(RAYS))  # (3, M, S)
    depth, slot = torch.full_like(ray[0], NOWHERE), torch.zeros_like(ray[0], dtype=torch.int64)
    for i in range(OBJECTS):
        shape = torch.where(inside[:, i].reshape(-1).index_select(0, scene * size**2 + pixel), 0, -OBJECTS)
        found = _meet_one(world, shape + pick(world.shape, scene * OBJECTS + i), scene, i, ray)
        slot = torch.where(found < depth, i, slot)
        depth = torch.minimum(depth, found)
    return Hits(scene, pixel, ray, depth, slot, depth < NOWHERE)


def _inside(world: World, size: int) -> Tensor:
    """(B, 3, P) True for the pixels that touch an object's box."""
    edges = torch.arange(size, device=world.box.device)
    left, top, right, bottom = (world.box * size)[:, :, None]
    across = (edges + 1 > left) & (edges < right)  # (B * 3, W)
    down = (edges + 1 > top) & (edges < bottom) & (world.shape >= 0)[:, None]
    return (down[:, :, None] & across[:, None]).reshape(-1, OBJECTS, size**2)


def _meet_one(world: World, shape: Tensor, scene: Tensor, slot: int, ray: Tensor) -> Tensor:
    """(M, S) depth at which rays meet the object in this slot; its shape (M,) is negative where it is absent."""
    found = torch.full_like(ray[0], NOWHERE)
    for i, within in enumerate(MEET):
        rows = (shape == i).nonzero()[:, 0]
        there = scene[rows]
        solid = world.solid(there[:, None] * OBJECTS + slot)
        origin = solid.local(pick(world.eye, there)[:, :, None] - solid.centre)
        start, end = within(origin, solid.local(ray.index_select(1, rows)), solid.width, solid.height)
        found[rows] = torch.where(start < end, start, NOWHERE)
    return found
