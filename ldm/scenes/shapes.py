"""The four solids, each in its own frame: intersections with rays, normals, and outlines for shadows.

Only + - * / sqrt, comparisons and choices, which are rounded alike on every device, thread and batch position.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEVEL = 0.1  # of a half width; the edges of cubes and cylinders are rounded by this to catch the light
NOWHERE = 1e9  # the depth of a ray that meets nothing


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(3, N), (3, N) -> (N,), summed in this order."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: Tensor) -> Tensor:
    """(3, N) scaled to length one."""
    return a / dot(a, a).sqrt().clamp(min=1e-6)


def smooth(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """0 below low, 1 above high, a cubic between."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


# --------------------------------------------------- where the ray o + t d is within: (from, to), empty if from > to


def sphere(o: Tensor, d: Tensor, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """A ball of this radius."""
    return _roots(dot(d, d), dot(o, d), dot(o, o) - width * width)


def cube(o: Tensor, d: Tensor, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """A box along the axes, by slabs (Kay & Kajiya, 1986)."""
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i], width) for i in range(3))
    return torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1)


def cylinder(o: Tensor, d: Tensor, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """An upright cylinder: an infinite one between two planes."""
    a = d[0] * d[0] + d[1] * d[1]
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] * o[0] + o[1] * o[1] - width * width
    return _between(_roots(a, b, c), _slab(o[2], d[2], height))


def cone(o: Tensor, d: Tensor, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """An upright cone, for rays less steep than its side."""
    slope = width / (2 * height)
    k, above = slope * slope, height - o[2]
    a = d[0] * d[0] + d[1] * d[1] - k * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + k * above * d[2]
    c = o[0] * o[0] + o[1] * o[1] - k * above * above
    return _between(_roots(a, b, c), _slab(o[2], d[2], height))


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Where a t^2 + 2 b t + c < 0."""
    inside = b * b - a * c
    root = inside.clamp(min=0).sqrt()
    return torch.where(inside > 0, (-b - root) / a, NOWHERE), (root - b) / a


def _slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where |o + t d| < half."""
    d = torch.where(d.abs() < 1e-7, 1e-7, d)
    middle, reach = -o / d, half / d.abs()
    return middle - reach, middle + reach


def _between(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


# ------------------------------------------------------------------------------ normals (3, N) at points on the surface


def sphere_normal(p: Tensor, width: Tensor, height: Tensor, bevel: Tensor) -> Tensor:
    """The direction from the centre."""
    return p / width


def cube_normal(p: Tensor, width: Tensor, height: Tensor, bevel: Tensor) -> Tensor:
    """The normal of a box with rounded edges."""
    return _rounded(p / width, bevel)


def cylinder_normal(p: Tensor, width: Tensor, height: Tensor, bevel: Tensor) -> Tensor:
    """The normal of a cylinder with rounded rims."""
    across = (p[0] * p[0] + p[1] * p[1]).sqrt().clamp(min=1e-6)
    side = (across / width - (1 - bevel)).clamp(min=0) / across
    top = (p[2].abs() / height - (1 - bevel)).clamp(min=0) * p[2].sign()
    return unit(torch.stack((p[0] * side, p[1] * side, top)))


def cone_normal(p: Tensor, width: Tensor, height: Tensor, bevel: Tensor) -> Tensor:
    """Away from the axis and up; straight up at the tip."""
    across = (p[0] * p[0] + p[1] * p[1]).sqrt().clamp(min=1e-6)
    out = 2 * height / across * smooth(across / width, 0, 0.5 * bevel)
    return unit(torch.stack((p[0] * out, p[1] * out, width.expand_as(across))))


def _rounded(p: Tensor, bevel: Tensor) -> Tensor:
    return unit((p.abs() - (1 - bevel)).clamp(min=0) * p.sign())


# ---------------------- how far points (3, N) are outside of an object's outline, seen along the light, from its centre


def box_outline(p: Tensor, outline: Tensor) -> Tensor:
    """A cube is seen as a hexagon: three directions, and the distance of its sides from the centre along each."""
    first, second, third = (dot(p, outline[3 * i : 3 * i + 3]).abs() - outline[9 + i] for i in range(3))
    return torch.maximum(torch.maximum(first, second), third)


def round_outline(p: Tensor, outline: Tensor) -> Tensor:
    """A ball, cylinder or cone is seen as the hull of two circles (or of a circle and a point) on its axis."""
    bottom, length, low, high, slant, upright = outline[6:]
    v, u = dot(p, outline[:3]).abs(), dot(p, outline[3:6]) - bottom
    along = upright * u - slant * v
    top = u - length
    below, above = (v * v + u * u).sqrt() - low, (v * v + top * top).sqrt() - high
    side = upright * v + slant * u - low
    return torch.where(along < 0, below, torch.where(along > upright * length, above, side))
