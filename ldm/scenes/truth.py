"""What is known of every pixel: which object it shows, its class, depth and normal, and where outlines run."""

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
SHARP = 1e-3  # a bevel that nobody sees
CREASE = 0.8  # cosine between normals below which there is an edge


def maps(some: World, hits: Hits, size: int) -> dict[str, Tensor]:
    """All of MAPS, object i of a scene being i + 1 in the mask, and its shape + 1 in the segmentation."""
    mask = _mask(some, hits, size)  # (B, P) 0 for the floor
    depth, normals = _surface(some, hits, mask, size)
    rows = torch.arange(len(mask), device=mask.device)[:, None] * OBJECTS
    classes = torch.where(mask > 0, pick(some.shape, rows + (mask - 1).clamp(min=0)) + 1, 0)
    plane = (-1, size, size)
    return {
        "mask": mask.reshape(plane),
        "segmentation": classes.reshape(plane),
        "boxes": _boxes(some, hits, size),
        "box_labels": some.shape.reshape(-1, OBJECTS),
        "depth": depth.reshape(plane),
        "normals": normals.reshape(3, *plane).transpose(0, 1).contiguous(),
        "edges": _edges(mask.reshape(plane), normals.reshape(3, *plane)),
    }


def _mask(some: World, hits: Hits, size: int) -> Tensor:
    """(B, P) which of the floor and the objects covers most of each pixel."""
    share, most = (~hits.hit).sum(1), torch.zeros_like(hits.scene)
    for i in range(OBJECTS):  # argmax would choose among equals as the device likes
        covered = (hits.hit & (hits.slot == i)).sum(1)
        most = torch.where(covered > share, i + 1, most)
        share = torch.maximum(covered, share)
    mask = torch.zeros(some.eye.shape[1] * size**2, dtype=torch.int64, device=share.device)
    return mask.index_copy_(0, hits.scene * size**2 + hits.pixel, most).reshape(-1, size**2)


def _surface(some: World, hits: Hits, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Depth (B, P) along the camera's axis and normals (3, B, P) as the camera sees them: right, up, towards it."""
    ray = directions(some.axes, *centres(size, mask.device))
    depth = some.eye[2, :, None] / (-ray[2]).clamp(min=0.02)
    up = torch.tensor((0.0, 0.0, 1.0), device=mask.device)[:, None, None]
    normal = up.expand_as(ray).reshape(3, -1).clone()
    shown = mask.reshape(-1)[hits.scene * size**2 + hits.pixel]
    rows = (shown > 0).nonzero()[:, 0]
    middle = _middlemost(hits.hit[rows] & (hits.slot[rows] == shown[rows, None] - 1)) + rows * RAYS**2
    scene = hits.scene[rows]
    number = scene * OBJECTS + shown[rows] - 1
    met = pick(hits.depth.reshape(-1), middle)
    p = pick(some.eye, scene) + pick(hits.ray.reshape(3, -1), middle) * met
    where = scene * size**2 + hits.pixel[rows]
    normal.index_copy_(1, where, normals(some, some.solid(number), number, p, torch.full_like(met, SHARP)))
    depth.view(-1).index_copy_(0, where, met)
    normal = normal.reshape(3, *mask.shape)
    seen = [shapes.dot(normal, axis[:, :, None]) for axis in (some.right, some.up, -some.forward)]
    return depth, torch.stack(seen)


def _middlemost(own: Tensor) -> Tensor:
    """(M,) of the marked rays (M, S) the one nearest to the middle of its pixel."""
    place = torch.arange(RAYS, device=own.device) * 2 + 1 - RAYS
    off = (place[:, None] * place[:, None] + place * place).reshape(-1) * RAYS**2 + torch.arange(
        RAYS**2, device=own.device
    )
    return torch.where(own, off, off.max() + 1).argmin(1)  # no two are equally far


def normals(some: World, solid: Solid, number: Tensor, p: Tensor, bevel: Tensor) -> Tensor:
    """(3, N) in the world, at points p of these objects."""
    own = solid.local(p - solid.centre)
    normal, shape = torch.empty_like(own), pick(some.shape, number)
    for i, of in enumerate(NORMAL):
        rows = (shape == i).nonzero()[:, 0]
        width, height, round_by = (pick(values, rows) for values in (solid.width, solid.height, bevel))
        normal.index_copy_(1, rows, of(pick(own, rows), width, height, round_by))
    return solid.world(normal)


def _boxes(some: World, hits: Hits, size: int) -> Tensor:
    """(B, 3, 4) left, top, right, bottom, in [0, 1], of the pixels that show any of an object; zeros for none."""
    cover = torch.zeros(some.shape.numel(), size, size, dtype=torch.bool, device=some.shape.device)
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
    """(B, H, W) where the next pixel to the right or below shows another thing, or another side of it."""
    edges = torch.zeros_like(mask, dtype=torch.bool)
    edges[..., :-1] |= _differ(mask[..., :-1], mask[..., 1:], normal[..., :-1], normal[..., 1:])
    edges[:, :-1] |= _differ(mask[:, :-1], mask[:, 1:], normal[:, :, :-1], normal[:, :, 1:])
    return edges


def _differ(mask: Tensor, next_mask: Tensor, normal: Tensor, next_normal: Tensor) -> Tensor:
    return (mask != next_mask) | (shapes.dot(normal, next_normal) < CREASE)
