"""Pictures of scenes, batched, on any device: the floor once a pixel, objects by many rays where they may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.scenes import shading, shapes
from ldm.data.scenes.description import OBJECTS, SHAPES, Scene, Table
from ldm.data.scenes.relations import FOCAL
from ldm.data.scenes.shapes import NOWHERE, dot, unit
from ldm.data.scenes.solids import Solid, World, unpacked, world

RAYS = 4  # to a pixel's side, where an object ends
MEET = (shapes.sphere, shapes.cube, shapes.cylinder, shapes.cone)  # in the order of SHAPES
NORMAL = (shapes.sphere_normal, shapes.cube_normal, shapes.cylinder_normal, shapes.cone_normal)
CUBE = SHAPES.index("cube")
CHUNK = {"cpu": 2**16}  # pixels at a time: what stays in a core's cache
CHUNK_ELSEWHERE = 2**22
WANTS = ("image", "mask")


class Hits(NamedTuple):
    """What the rays of the M pixels in which objects may be meet first; S = RAYS^2."""

    scene: Tensor  # (M,)
    pixel: Tensor  # (M,)
    ray: Tensor  # (3, M, S), one long along the camera's axis
    depth: Tensor  # (M, S) NOWHERE for the floor
    slot: Tensor  # (M, S) which object


def render(
    scenes: Sequence[Scene] | Table, size: int, device: torch.device | str = "cpu", want: Sequence[str] = ("image",)
) -> dict[str, Tensor]:
    """Pictures of these scenes: image uint8 (B, 3, H, W); mask int64 (B, H, W), 0 for the floor, else object + 1."""
    if size < 1:
        raise ValueError(f"size: must be positive; got {size}")
    if unknown := set(want) - set(WANTS):
        raise ValueError(f"want: unknown name; got {', '.join(sorted(unknown))}; expected some of {', '.join(WANTS)}")
    everything = world(scenes if isinstance(scenes, Table) else Table.of(scenes), device)
    count = everything.eye.shape[1]
    step = max(1, CHUNK.get(everything.eye.device.type, CHUNK_ELSEWHERE) // size**2)
    parts = [_render(everything.take(slice(i, min(i + step, count))), size, want) for i in range(0, count, step)]
    return {name: torch.cat([part[name] for part in parts]) for name in want}


def _render(some: World, size: int, want: Sequence[str]) -> dict[str, Tensor]:
    hits = meet(some, size)
    made = {}
    if "image" in want:
        made["image"] = _image(some, hits, size)
    if "mask" in want:
        made["mask"] = _mask(some, hits, size)
    return made


def directions(some: World, scene: Tensor | None, across: Tensor, up: Tensor) -> Tensor:
    """Rays through points of the picture, one long along the camera's axis, so that t is depth."""
    right, upward, forward = (
        (axis[:, :, None] if scene is None else axis[:, scene, None]) for axis in (some.right, some.up, some.forward)
    )
    return forward + right * (across / FOCAL) + upward * (up / FOCAL)


def centres(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right and up, from -1 to 1, of pixels row by row, each (size^2,)."""
    place = (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1 - size) / size
    return place.repeat(size), (-place).repeat_interleave(size)


def meet(some: World, size: int) -> Hits:
    """Send rays where objects may be, and keep the nearest of what each meets."""
    edges = torch.arange(size, device=some.box.device)
    left, top, right, bottom = (some.box * size)[:, :, None]
    across = (edges + 1 > left) & (edges < right)  # (B * 3, W)
    down = (edges + 1 > top) & (edges < bottom)
    inside = (down[:, :, None] & across[:, None] & (some.shape >= 0)[:, None, None]).reshape(-1, OBJECTS, size**2)
    scene, pixel = inside.any(1).nonzero().unbind(1)  # (M,)
    x, y = (place[pixel, None] for place in centres(size, edges.device))
    step = (torch.arange(RAYS, device=edges.device, dtype=torch.float32) * 2 + 1 - RAYS) / (RAYS * size)
    ray = directions(some, scene, x + step.repeat(RAYS), y - step.repeat_interleave(RAYS))  # (3, M, S)
    depth, slot = torch.full(ray.shape[1:], NOWHERE, device=ray.device), torch.zeros_like(ray[0], dtype=torch.int64)
    for i in range(OBJECTS):
        shape = torch.where(inside[scene, i, pixel], some.shape[scene * OBJECTS + i], -1)
        found = torch.full_like(depth, NOWHERE)
        for j, within in enumerate(MEET):
            rows = (shape == j).nonzero()[:, 0]
            solid = some.solid(scene[rows, None] * OBJECTS + i)
            origin = some.eye[:, scene[rows], None] - solid.centre
            start, end = within(solid.local(origin), solid.local(ray[:, rows]), solid.width, solid.height)
            found[rows] = torch.where(start < end, start, NOWHERE)
        slot = torch.where(found < depth, i, slot)
        depth = torch.minimum(depth, found)
    return Hits(scene, pixel, ray, depth, slot)


# ------------------------------------------------------------------------------------------------------------ pictures


def _image(some: World, hits: Hits, size: int) -> Tensor:
    """(B, 3, H, W) uint8."""
    picture = _floor(some, size)  # (3, B, P) linear
    hit = hits.depth < NOWHERE  # (M, S)
    sharp = _whole(hits, hit)[:, None] & ~_few(hits.ray.device)  # rays that a pixel within an object can spare
    pixel, ray = (hit & ~sharp).nonzero().unbind(1)
    colour = torch.zeros_like(hits.ray)
    colour[:, pixel, ray] = _objects(some, hits, pixel, ray, size)
    count = torch.where(_whole(hits, hit), int(_few(hits.ray.device).sum()), RAYS**2)
    missed = (RAYS**2 - _total(hit.float()[None])[0]) / RAYS**2
    seen = _total(colour) / count + picture[:, hits.scene, hits.pixel] * missed
    picture[:, hits.scene, hits.pixel] = seen
    shown = (shading.encoded(picture) * 255 + 0.5).to(torch.uint8)
    return shown.permute(1, 0, 2).reshape(-1, 3, size, size)


def _few(device: torch.device) -> Tensor:
    """(S,) four rays, one from the middle of each quarter of a pixel."""
    place = torch.arange(RAYS, device=device)
    some = (place == RAYS // 4) | (place == RAYS - 1 - RAYS // 4)
    return (some[:, None] & some).reshape(-1)


def _whole(hits: Hits, hit: Tensor) -> Tensor:
    """(M,) pixels that show one object and nothing else."""
    return (hit & (hits.slot == hits.slot[:, :1])).all(1)


def _total(values: Tensor) -> Tensor:
    """(C, M, S) -> (C, M), added in one order whatever the batch."""
    total = values[..., 0].clone()
    for i in range(1, values.shape[-1]):
        total += values[..., i]
    return total


def _floor(some: World, size: int) -> Tensor:
    """The floor's colours (3, B, P)."""
    ray = directions(some, None, *centres(size, some.eye.device))
    depth = some.eye[2, :, None] / (-ray[2]).clamp(min=0.02)
    p = some.eye[:, :, None] + ray * depth
    p[2] = 0
    wide = depth * (2 / (FOCAL * size))  # what a pixel covers of the floor
    long = wide * (dot(ray, ray).sqrt() / (-ray[2]).clamp(min=0.02))
    albedo = torch.empty_like(p)
    for i, pattern in enumerate(shading.FLOOR):
        rows = (some.floor == i).nonzero()[:, 0]
        albedo[:, rows] = pattern(p[0, rows], p[1, rows], wide[rows], long[rows])
    shadow, hidden = _shade_floor(some, p)
    return shading.lit_floor(albedo, shadow, hidden, some.light[:, :, None], p[0] * p[0] + p[1] * p[1])


def _shade_floor(some: World, p: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the lamp and of the sky objects hide from the floor, each (B, P)."""
    lamp, sky = torch.ones_like(p[0]), torch.ones_like(p[0])
    up = torch.zeros_like(p[:, :1, :1])
    up[2] = 1
    shape = some.shape.reshape(-1, OBJECTS)
    for i in range(OBJECTS):
        for box in (True, False):
            rows = ((shape[:, i] == CUBE) if box else (shape[:, i] >= 0) & (shape[:, i] != CUBE)).nonzero()[:, 0]
            solid = some.solid(rows[:, None] * OBJECTS + i)
            there = p[:, rows]
            lamp[rows] *= 1 - shading.occlusion(there, some.light[:, rows, None], solid, box)
            sky[rows] *= 1 - shading.closeness(there, up, solid)
    return 1 - lamp, 1 - sky


def _objects(some: World, hits: Hits, pixel: Tensor, ray: Tensor, size: int) -> Tensor:
    """The colours (3, N) of objects where these rays meet them."""
    scene, slot, depth = hits.scene[pixel], hits.slot[pixel, ray], hits.depth[pixel, ray]
    number = scene * OBJECTS + slot
    solid, light = some.solid(number), some.light[:, scene]
    towards = hits.ray[:, pixel, ray]
    p = some.eye[:, scene] + towards * depth
    normal = _normals(some, solid, number, p, depth, size)
    lamp, sky = torch.ones_like(depth), torch.ones_like(depth)
    for i in range(1, OBJECTS):
        other = scene * OBJECTS + (slot + i) % OBJECTS
        for box in (True, False):
            shape = some.shape[other]
            rows = ((shape == CUBE) if box else (shape >= 0) & (shape != CUBE)).nonzero()[:, 0]
            there, hider = p[:, rows], some.solid(other[rows])
            lamp[rows] *= 1 - shading.occlusion(there, light[:, rows], hider, box)
            sky[rows] *= 1 - shading.closeness(there, normal[:, rows], hider)
    colour = shading.lit(solid.albedo, normal, light, 1 - lamp, 1 - sky, p[2])
    rows = (solid.shiny > 0).nonzero()[:, 0]
    return _polish(some, colour, rows, p, unit(towards), normal, light, 1 - lamp, solid, scene)


def _polish(some, colour, rows, p, towards, normal, light, shadow, solid: Solid, scene) -> Tensor:  # type: ignore[no-untyped-def]
    towards, normal, albedo = towards[:, rows], normal[:, rows], solid.albedo[:, rows]
    ground = torch.full_like(albedo, 0.4)
    mirror = shading.mirrored(p[:, rows], towards, normal, light[:, rows], ground, shadow[rows])
    colour[:, rows] = shading.polished(colour[:, rows], albedo, mirror, -dot(towards, normal))
    return colour


def _normals(some: World, solid: Solid, number: Tensor, p: Tensor, depth: Tensor, size: int) -> Tensor:
    """(3, N) in the world; a bevel is at least as wide as a pixel, or it would glitter."""
    own = solid.local(p - solid.centre)
    bevel = torch.maximum(depth * (2 / (FOCAL * size)) / solid.width, torch.full_like(depth, shapes.BEVEL))
    normal = torch.empty_like(own)
    for i, of in enumerate(NORMAL):
        rows = (some.shape[number] == i).nonzero()[:, 0]
        normal[:, rows] = of(own[:, rows], solid.width[rows], solid.height[rows], bevel[rows])
    return solid.world(normal)


def _mask(some: World, hits: Hits, size: int) -> Tensor:
    """(B, H, W) which object covers most of each pixel, if not the floor."""
    hit = hits.depth < NOWHERE
    mask = torch.zeros(some.eye.shape[1], size * size, dtype=torch.int64, device=hit.device)
    shares = torch.stack([(~hit).sum(1), *((hit & (hits.slot == i)).sum(1) for i in range(OBJECTS))])
    mask[hits.scene, hits.pixel] = shares.argmax(0)
    return mask.reshape(-1, size, size)
