"""Light on the floor and on objects: one soft lamp, a bright sky all round, and what shiny things mirror.

Written, as shapes.py is, with operations that are rounded alike everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.data.scenes.shapes import box_outline, dot, round_outline, smooth, unit
from ldm.data.scenes.solids import Solid

LAMP, SKY, FILL = 0.80, 0.42, 0.16  # brightness of the lamp, of the sky and of a weak light from the lamp's other side
SOFT = 0.11  # half of the lamp's width over its distance: what makes a shadow's edge wider the further it falls
BACKDROP = (0.50, 0.53, 0.58)  # what the floor fades into


def occlusion(p: Tensor, light: Tensor, solid: Solid, box: bool) -> Tensor:
    """How much of the lamp an object hides from points p (3, ...), from 0 to 1."""
    to = p - solid.centre
    if box:
        beyond = box_outline(to, light, solid.turn, solid.width)
    else:
        drawn = torch.where(solid.ball > 0, 1.0, 1 / light[2])
        beyond = round_outline(to, light, solid.bottom, solid.length, solid.low, solid.high, drawn)
    towards = -dot(to, light)  # how far along the light the object is
    edge = SOFT * towards.clamp(min=0.08)
    return smooth(-beyond, -edge, edge) * (towards > 0)


def closeness(p: Tensor, normal: Tensor, solid: Solid) -> Tensor:
    """The part of the sky above p that a ball in the object's place hides: cos / distance^2 (its form factor)."""
    to = solid.centre - p
    square = dot(to, to).clamp(min=1e-4)
    radius = torch.maximum(solid.width, solid.height)
    return (dot(normal, to).clamp(min=0) * radius * radius / (square * square.sqrt())).clamp(max=1)


# ----------------------------------------------------------------------------------------------------------- floors


def wave(x: Tensor, width: Tensor) -> Tensor:
    """The square wave of period 2 (+1, then -1), averaged over this width round x, so that it never flickers."""
    return (_rise(x + 0.5 * width) - _rise(x - 0.5 * width)) / width


def _rise(x: Tensor) -> Tensor:
    """The integral of the square wave: a zigzag between 0 and 1."""
    return 1 - (x - 2 * (0.5 * x).floor() - 1).abs()


def seam(x: Tensor, width: Tensor, gap: float) -> Tensor:
    """How much of this width round x lies within `gap` beyond a whole number."""
    low, high = x - 0.5 * width, x + 0.5 * width
    return (_filled(high, gap) - _filled(low, gap)) / width


def _filled(x: Tensor, gap: float) -> Tensor:
    whole = x.floor()
    return whole * gap + (x - whole).clamp(max=gap)


def gray(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Plain."""
    return torch.stack((torch.full_like(x, 0.45), torch.full_like(x, 0.45), torch.full_like(x, 0.46)))


def wooden(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Planks along x, each of its own tone, with dark seams."""
    plank, wide = 1.4 * y, (1.4 * wy).clamp(max=0.99)
    low, high = (plank - 0.5 * wide).floor(), (plank + 0.5 * wide).floor()
    share = ((plank + 0.5 * wide - high) / wide).clamp(0, 1) * (high > low)
    tone = _tone(low) + (_tone(high) - _tone(low)) * share
    tone = (0.86 + 0.2 * tone) * (1 - 0.35 * seam(plank, wide, 0.05))
    return torch.stack((0.56 * tone, 0.37 * tone, 0.21 * tone))


def _tone(plank: Tensor) -> Tensor:
    step = plank * 0.618034
    return step - step.floor()


def checkered(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Squares in two close grays."""
    tone = 0.46 + 0.12 * wave(0.9 * x, 0.9 * wx) * wave(0.9 * y, 0.9 * wy)
    return torch.stack((tone, tone, tone * 0.98))


def striped(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Broad stripes away from the camera, of a cool and a warm tone."""
    side = wave(1.1 * x, 1.1 * wx)
    return torch.stack((0.52 + 0.05 * side, 0.50 + 0.08 * side, 0.46 + 0.13 * side))


FLOOR = (gray, wooden, checkered, striped)  # in the order of description.FLOORS


def lit_floor(albedo: Tensor, shadow: Tensor, hidden: Tensor, light: Tensor, away: Tensor) -> Tensor:
    """The floor's colour (3, ...): lamp and sky, fading into the backdrop by the squared distance from the middle."""
    lamp = (LAMP * 1.15) * light[2] * (1 - shadow)
    colour = albedo * (lamp + SKY * (1 - 0.85 * hidden))
    fade = smooth(away, 4.0, 150.0)
    backdrop = torch.tensor(BACKDROP, device=albedo.device).reshape(3, *[1] * (albedo.ndim - 1))
    return colour + (backdrop * colour.new_ones(()) - colour) * fade


# ---------------------------------------------------------------------------------------------------------- objects


def lit(albedo: Tensor, normal: Tensor, light: Tensor, shadow: Tensor, hidden: Tensor, height: Tensor) -> Tensor:
    """A dull surface's colour: the lamp, the sky above, the floor's light from below, and a little from behind."""
    lamp = LAMP * 1.35 * dot(normal, light).clamp(min=0) * (1 - shadow)
    across = (light[0] * light[0] + light[1] * light[1]).sqrt()
    behind = FILL * (-(normal[0] * light[1] - normal[1] * light[0]) / across).clamp(min=0)
    near = smooth(height, -0.3, 0.8)  # just above the floor there is little light
    above = 0.5 + 0.5 * normal[2]
    sky = SKY * above * (1 - 0.8 * hidden) + 0.30 * (1 - above) * near
    return albedo * (lamp + sky * (0.55 + 0.45 * near) + behind)


def mirrored(p: Tensor, ray: Tensor, normal: Tensor, light: Tensor, floor: Tensor, shadow: Tensor) -> Tensor:
    """What is seen along the mirrored ray: a dark ceiling with a wide lamp in it, a bright horizon, the floor."""
    r = ray - normal * (2 * dot(ray, normal))
    up = r[2]
    reach = p[2].clamp(min=0) / (-up).clamp(min=1e-3)
    below = floor * (0.25 + 0.75 * smooth(reach, 0.0, 1.2))
    sky = 0.16 + 0.50 * smooth(up, -0.05, 0.35) - 0.30 * smooth(up, 0.35, 0.9)
    towards = dot(r, light)
    lamp = 3.2 * smooth(towards, 0.955, 0.985) * (1 - shadow) + 0.5 * smooth(towards, 0.6, 1.0)
    return torch.where(up < 0, below, sky.expand_as(below)) + lamp * (up > 0)


def polished(colour: Tensor, albedo: Tensor, mirror: Tensor, facing: Tensor) -> Tensor:
    """A coloured mirror over a dull ground: more of it at grazing angles (Schlick, 1994)."""
    grazing = (1 - facing).clamp(0, 1)
    grazing = grazing * grazing
    grazing = grazing * grazing * (1 - facing).clamp(0, 1)
    tint = 0.30 + 0.70 * albedo
    return colour * 0.62 + mirror * tint * (0.34 + 0.5 * grazing)


def encoded(colour: Tensor) -> Tensor:
    """Linear light to what a screen shows, from 0 to 1."""
    return colour.clamp(0, 1).sqrt()


__all__ = ["FLOOR", "closeness", "encoded", "lit", "lit_floor", "mirrored", "occlusion", "polished", "unit"]
