"""Ground truth of every pixel: its object, class, depth and normal, and the edges."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.scenes import shapes
from ldm.scenes.description import OBJECTS
from ldm.scenes.rays import RAYS, Hits, centres, directions
from ldm.scenes.solids import Solid, World, pick

MAPS = ("mask", "segmentation", "boxes", "box_labels", "depth", "normals", "edges")
NORMAL = (
    shapes.sphere_normal,
    shapes.cube_normal,
    shapes.cylinder_normal,
    shapes.cone_normal,
)  # in the order of SHAPES
SHARP = 1e-3  # an invisible bevel
CREASE = 0.8  # there is an edge where the cosine between normals is smaller


def maps(world: World, hits: Hits, size: int) -> dict[str, Tensor]:
    """All of MAPS; object i of a scene is i + 1 in the mask, and shape + 1 in the segmentation."""
    mask = _mask(world, hits, size)  # (B, P) 0 for the floor
    depth, normals = _surface(world, hits, mask, size)
    rows = torch.arange(len(mask), device=mask.device)[:, None] * OBJECTS
    classes = torch.where(mask > 0, pick(world.shape, rows + (mask - 1).clamp(min=0)) + 1, 0)
    plane = (-1, size, size)
    return {
        "mask": mask.reshape(plane),
        "segmentation": classes.reshape(plane),
        "boxes": _boxes(world, hits, size),
        "box_labels": world.shape.reshape(-1, OBJECTS),
        "depth": depth.reshape(plane),
        "normals": normals.reshape(3, *plane).transpose(0, 1).contiguous(),
        "edges": _edges(mask.reshape(plane), normals.reshape(3, *plane)),
    }


def _mask(world: World, hits: Hits, size: int) -> Tensor:
    """(B, P) the object, or the floor, that covers most of each pixel."""
    share, most = (~hits.hit).sum(1), torch.zeros_like(hits.scene)
    for i in range(OBJECTS):  # argmax would break ties differently on each device
        covered = (hits.hit & (hits.slot == i)).sum(1)
        most = torch.where(covered > share, i + 1, most)
        share = torch.maximum(covered, share)
    mask = torch.zeros(world.eye.shape[1] * size**2, dtype=torch.int64, device=share.device)
    return mask.index_copy_(0, hits.scene * size**2 + hits.pixel, most).reshape(-1, size**2)


def _surface(world: World, hits: Hits, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Depth (B, P) along the camera's axis and normals (3, B, P) as the camera sees them: right, up, towards it."""
    ray = directions(world.axes, *centres(size, mask.device))
    depth = world.eye[2, :, None] / (-ray[2]).clamp(min=0.02)
    up = torch.tensor((0.0, 0.0, 1.0), device=mask.device)[:, None, None]
    normal = up.expand_as(ray).reshape(3, -1).clone()
    shown = mask.reshape(-1)[hits.scene * size**2 + hits.pixel]
    rows = (shown > 0).nonzero()[:, 0]
    middle = _middlemost(hits.hit[rows] & (hits.slot[rows] == shown[rows, None] - 1)) + rows * RAYS**2
    scene = hits.scene[rows]
    number = scene * OBJECTS + shown[rows] - 1
    met = pick(hits.depth.reshape(-1), middle)
    p = pick(world.eye, scene) + pick(hits.ray.reshape(3, -1), middle) * met
    pixel = scene * size**2 + hits.pixel[rows]
    normal.index_copy_(1, pixel, normals(world, world.solid(number), number, p, torch.full_like(met, SHARP)))
    depth.view(-1).index_copy_(0, pixel, met)
    normal = normal.reshape(3, *mask.shape)
    seen = [shapes.dot(normal, axis[:, :, None]) for axis in (world.right, world.up, -world.forward)]
    return depth, torch.stack(seen)


def _middlemost(own: Tensor) -> Tensor:
    """(M,) the marked ray, of (M, S), that is nearest to the middle of its pixel."""
    place = torch.arange(RAYS, device=own.device) * 2 + 1 - RAYS
    off = (place[:, None] * place[:, None] + place * place).reshape(-1) * RAYS**2 + torch.arange(
        RAYS**2, device=own.device
    )
    return torch.where(own, off, off.max() + 1).argmin(1)  # no two are equally far


def normals(world: World, solid: Solid, number: Tensor, p: Tensor, bevel: Tensor) -> Tensor:
    """(3, N) normals in the world at points p of these objects."""
    own = solid.local(p - solid.centre)
    normal, shape = torch.empty_like(own), pick(world.shape, number)
    for i, of in enumerate(NORMAL):
        rows = (shape == i).nonzero()[:, 0]
        width, height, round_by = (pick(values, rows) for values in (solid.width, solid.height, bevel))
        normal.index_copy_(1, rows, of(pick(own, rows), width, height, round_by))
    return solid.world(normal)


def _boxes(world: World, hits: Hits, size: int) -> Tensor:
    """(B, 3, 4) left, top, right, bottom in [0, 1] of the pixels that show an object; zeros if there are none."""
    cover = torch.zeros(world.shape.numel(), size, size, dtype=torch.bool, device=world.shape.device)
    for i in range(OBJECTS):
        rows = (hits.hit & (hits.slot == i)).any(1).nonzero()[:, 0]
        cover[hits.scene[rows] * OBJECTS + i, hits.pixel[rows] // size, hits.pixel[rows] % size] = True
    place = torch.arange(size, device=cover.device)
    spans = []
    for line in (cover.any(1), cover.any(2)):  # (B * 3, size)
        spans.append((torch.where(line, place, size).amin(1), torch.where(line, place + 1, 0).amax(1)))
    (left, right), (top, bottom) = spans
    box = torch.stack((left, top, right, bottom), 1).float() / size
    return torch.where((right > 0)[:, None], box, 0.0).reshape(-1, OBJECTS, 4)


def _edges(mask: Tensor, normal: Tensor) -> Tensor:
    """(B, H, W) True where the next pixel to the right or below shows another object, or another side of it."""
    edges = torch.zeros_like(mask, dtype=torch.bool)
    edges[..., :-1] |= _differ(mask[..., :-1], mask[..., 1:], normal[..., :-1], normal[..., 1:])
    edges[:, :-1] |= _differ(mask[:, :-1], mask[:, 1:], normal[:, :, :-1], normal[:, :, 1:])
    return edges


def _differ(mask: Tensor, next_mask: Tensor, normal: Tensor, next_normal: Tensor) -> Tensor:
    return (mask != next_mask) | (shapes.dot(normal, next_normal) < CREASE)
