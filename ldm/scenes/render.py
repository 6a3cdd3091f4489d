"""Rendering of scenes, batched, on any device: one sample per pixel for the floor, many rays where objects may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.scenes import shading, shapes, truth
from ldm.scenes.description import OBJECTS, SHAPES, Scene, Table
from ldm.scenes.rays import RAYS, Hits, centres, directions, meet
from ldm.scenes.relations import FOCAL
from ldm.scenes.shapes import dot, unit
from ldm.scenes.solids import World, pick, to_world

CUBE = SHAPES.index("cube")
CHUNK, CHUNK_ELSEWHERE = 2**16, 2**22  # pixels at a time: fits a core's cache; fills a GPU
WANTS = ("image", *truth.MAPS)


def render(
    scenes: Sequence[Scene] | Table, size: int, device: torch.device | str = "cpu", want: Sequence[str] = ("image",)
) -> dict[str, Tensor]:
    """Pictures of these scenes: `image` uint8 (B, 3, H, W), and any of truth.MAPS that `want` names."""
    if size < 1:
        raise ValueError(f"size: must be positive; got {size}")
    if unknown := set(want) - set(WANTS):
        raise ValueError(f"want: unknown name; got {', '.join(sorted(unknown))}; expected some of {', '.join(WANTS)}")
    everything = to_world(scenes if isinstance(scenes, Table) else Table.of(scenes), device)
    step = max(1, (CHUNK if everything.eye.device.type == "cpu" else CHUNK_ELSEWHERE) // size**2)
    count = everything.eye.shape[1]
    parts = [_render(everything.take(slice(i, min(i + step, count))), size, want) for i in range(0, count, step)]
    return {name: torch.cat([part[name] for part in parts]) for name in want}


def _render(world: World, size: int, want: Sequence[str]) -> dict[str, Tensor]:
    hits = meet(world, size)
    made = truth.maps(world, hits, size) if set(want) - {"image"} else {}
    if "image" in want:
        made["image"] = image(world, hits, size)
    return {name: made[name] for name in want}


def image(world: World, hits: Hits, size: int) -> Tensor:
    """(B, 3, H, W) uint8."""
    picture = floors(world, size)  # (3, B * P) linear
    plain, few = _plain(world, hits), _few(hits.ray.device)
    chosen = (hits.hit & (~plain[:, None] | few)).reshape(-1).nonzero()[:, 0]
    colour = torch.zeros_like(hits.ray)
    colour.view(3, -1).index_copy_(1, chosen, objects(world, hits, chosen, size))
    count = torch.where(plain, 4, RAYS**2)
    missed = 1 - total(hits.hit.float()[None]) / RAYS**2  # (1, M)
    pixel = hits.scene * size**2 + hits.pixel
    picture.index_copy_(1, pixel, total(colour) / count + pick(picture, pixel) * missed)
    shown = (shading.encoded(picture) * 255 + 0.5).to(torch.uint8)
    return shown.reshape(3, -1, size, size).transpose(0, 1).contiguous()


def _plain(world: World, hits: Hits) -> Tensor:
    """(M,) pixels that show one matte object only: few rays are enough."""
    shiny = pick(world.body[-1], hits.scene * OBJECTS + hits.slot[:, 0]) > 0
    return (hits.hit & (hits.slot == hits.slot[:, :1])).all(1) & ~shiny


def _few(device: torch.device) -> Tensor:
    """(S,) four rays, one from the middle of each quarter of a pixel."""
    place = torch.arange(RAYS, device=device)
    some = (place == RAYS // 4) | (place == RAYS - 1 - RAYS // 4)
    return (some[:, None] & some).reshape(-1)


def total(values: Tensor) -> Tensor:
    """(C, M, S) -> (C, M), summed in the same order for every batch."""
    sums = values[..., 0].clone()
    for i in range(1, values.shape[-1]):
        sums += values[..., i]
    return sums


# ------------------------------------------------------------------------------------------------------------ the floor


def floors(world: World, size: int) -> Tensor:
    """The floor's colours (3, B * P)."""
    ray = directions(world.axes, *centres(size, world.eye.device))
    down = (-ray[2]).clamp(min=0.02)
    depth = world.eye[2, :, None] / down
    p = world.eye[:, :, None] + ray * depth
    wide = depth * (2 / (FOCAL * size))  # the width of a pixel on the floor
    lamp, sky = _open(world, p)
    albedo = patterns(world.floor, p[0], p[1], wide, wide * (dot(ray, ray).sqrt() / down))
    away = p[0] * p[0] + p[1] * p[1]
    return shading.floor(albedo, world.light[:, :, None], 1 - lamp, 1 - sky, away).reshape(3, -1)


def patterns(floor: Tensor, x: Tensor, y: Tensor, wide: Tensor, long: Tensor) -> Tensor:
    """Unlit colours (3, N, ...) of the floors, averaged over `wide` by `long`."""
    albedo = torch.empty(3, *x.shape, device=x.device)
    for i, pattern in enumerate(shading.FLOOR):
        rows = (floor == i).nonzero()[:, 0]
        albedo.index_copy_(1, rows, pattern(*(values.index_select(0, rows) for values in (x, y, wide, long))))
    return albedo


def _open(world: World, p: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of the lamp and of the sky that objects do not hide from the floor, each (B, P)."""
    lamp, sky = torch.ones_like(p[0]), torch.ones_like(p[0])
    up = torch.tensor((0.0, 0.0, 1.0), device=p.device)[:, None, None]
    for i in range(OBJECTS):
        for rows, box in by_kind(world.shape[i::OBJECTS]):
            number = rows[:, None] * OBJECTS + i
            there, solid = p.index_select(1, rows), world.solid(number)
            light = pick(world.light, rows)[:, :, None]
            shadow = shading.occlusion(there, solid.centre, light, pick(world.outline, number), box)
            hidden = shading.closeness(there, up, solid.centre, torch.maximum(solid.width, solid.height))
            lamp[rows] *= 1 - shadow
            sky[rows] *= 1 - hidden
    return lamp, sky


def by_kind(shape: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The rows of cubes, then those of round objects: their outlines differ."""
    yield (shape == CUBE).nonzero()[:, 0], True
    yield ((shape >= 0) & (shape != CUBE)).nonzero()[:, 0], False


# ---------------------------------------------------------------------------------------------------------- the objects


class Points(NamedTuple):
    """N points where rays meet objects."""

    number: Tensor  # (N,) index of the object
    p: Tensor  # (3, N)
    towards: Tensor  # (3, N) unit direction of the ray
    normal: Tensor  # (3, N)
    light: Tensor  # (3, N)
    depth: Tensor  # (N,)

    def take(self, rows: Tensor) -> Points:
        """The points of these rows."""
        return Points(*(pick(field, rows) for field in self))


def objects(world: World, hits: Hits, chosen: Tensor, size: int) -> Tensor:
    """Colours (3, N) where the chosen ones of the M * S rays meet objects."""
    scene = pick(hits.scene, chosen // RAYS**2)
    number = scene * OBJECTS + pick(hits.slot.reshape(-1), chosen)
    solid, depth = world.solid(number), pick(hits.depth.reshape(-1), chosen)
    ray = pick(hits.ray.reshape(3, -1), chosen)
    p = pick(world.eye, scene) + ray * depth
    pixel = depth * (2 / (FOCAL * size))  # its width there; a narrower bevel would glitter
    bevel = torch.maximum(pixel / solid.width, torch.full_like(depth, shapes.BEVEL))
    normal = truth.normals(world, solid, number, p, bevel)
    points = Points(number, p, unit(ray), normal, pick(world.light, scene), depth)
    lamp, sky = _open_to(world, points)
    colour = shading.lit(solid.albedo, normal, points.light, 1 - lamp, 1 - sky, p[2])
    shiny = (solid.shiny > 0).nonzero()[:, 0]
    polished = _polished(
        world, points.take(shiny), pick(colour, shiny), pick(solid.albedo, shiny), pick(lamp, shiny), size
    )
    return colour.index_copy_(1, shiny, polished)


def _open_to(world: World, points: Points) -> tuple[Tensor, Tensor]:
    """The shares of the lamp and of the sky that other objects do not hide from each point, each (N,)."""
    lamp, sky = torch.ones_like(points.depth), torch.ones_like(points.depth)
    scene = points.number // OBJECTS
    for i in range(1, OBJECTS):
        other = scene * OBJECTS + (points.number + i - scene * OBJECTS) % OBJECTS
        for rows, box in by_kind(pick(world.shape, other)):
            number, here = pick(other, rows), points.take(rows)
            shadow, hidden = _hidden(world, number, here, box)
            lamp.index_copy_(0, rows, pick(lamp, rows) * (1 - shadow))
            sky.index_copy_(0, rows, pick(sky, rows) * (1 - hidden))
    return lamp, sky


def _hidden(world: World, number: Tensor, here: Points, box: bool) -> tuple[Tensor, Tensor]:
    """The shares of the lamp and of the sky that these objects hide from the points."""
    body = pick(world.body[:7], number)
    shadow = shading.occlusion(here.p, body[:3], here.light, pick(world.outline, number), box)
    return shadow, shading.closeness(here.p, here.normal, body[:3], torch.maximum(body[5], body[6]))


def _polished(world: World, points: Points, dull: Tensor, albedo: Tensor, lamp: Tensor, size: int) -> Tensor:
    """Colours (3, N) of shiny points: a mirror over a matte ground."""
    ray = shading.reflection(points.towards, points.normal)
    mirror = shading.sky(ray, points.light).expand_as(ray).clone()
    down = (ray[2] < 0).nonzero()[:, 0]
    mirror.index_copy_(1, down, _mirrored_floor(world, points.take(down), pick(ray, down), size))
    cos = -dot(points.towards, points.normal)
    return shading.polished(dull, albedo, mirror, shading.lamp_in(ray, points.light) * lamp, cos)


def _mirrored_floor(world: World, points: Points, ray: Tensor, size: int) -> Tensor:
    """The floor (3, N) where mirrored rays meet it, with the shadow of the mirroring object."""
    far = points.p[2].clamp(min=0) / (-ray[2]).clamp(min=0.03)
    ground = points.p + ray * far
    wide = (points.depth + 2 * far) * (2 / (FOCAL * size))
    albedo = patterns(pick(world.floor, points.number // OBJECTS), ground[0], ground[1], wide, 2 * wide)
    near, shadow = 1 - shapes.smooth(far, -0.6, 2.2), torch.zeros_like(far)
    for rows, box in by_kind(pick(world.shape, points.number)):
        number, light = pick(points.number, rows), pick(points.light, rows)
        centre, outline = pick(world.body[:3], number), pick(world.outline, number)
        shadow.index_copy_(0, rows, shading.occlusion(pick(ground, rows), centre, light, outline, box))
    away = ground[0] * ground[0] + ground[1] * ground[1]
    return shading.floor(albedo, points.light, shadow, near, away) * (1 - 0.6 * near)
