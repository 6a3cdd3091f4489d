"""Light on the floor and on objects: one soft lamp, a bright sky, and the mirror images of shiny objects.

Like shapes.py, it uses only operations that are rounded alike everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.scenes.shapes import box_outline, dot, round_outline, smooth

LAMP, SKY = (0.84, 0.80, 0.74), (0.40, 0.42, 0.46)  # warm and cool
FILL = 0.16  # a weak second light beside the lamp
SOFT = 0.11  # half of the lamp's width over its distance; shadows blur with the distance from the object
BACKDROP = (0.50, 0.53, 0.58)  # the floor fades into this


def occlusion(p: Tensor, centre: Tensor, light: Tensor, outline: Tensor, box: bool) -> Tensor:
    """The share of the lamp, from 0 to 1, that an object hides from points p (3, ...)."""
    to = p - centre
    beyond = box_outline(to, outline) if box else round_outline(to, outline)
    towards = -dot(to, light)  # distance to the object along the light
    edge = SOFT * towards.clamp(min=0.08)
    return smooth(-beyond, -edge, edge) * (towards > 0)


def closeness(p: Tensor, normal: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The share of the sky that a ball in the object's place hides from p: cos / distance^2, its form factor."""
    to = centre - p
    square = dot(to, to).clamp(min=1e-4)
    return (dot(normal, to).clamp(min=0) * radius * radius / (square * square.sqrt())).clamp(max=1)


# ----------------------------------------------------------------------------------------------------------- floors


def wave(x: Tensor, width: Tensor) -> Tensor:
    """The square wave of period 2 (+1, then -1), averaged over `width` round x, so that it does not alias."""
    return (_rise(x + 0.5 * width) - _rise(x - 0.5 * width)) / width


def _rise(x: Tensor) -> Tensor:
    """The integral of the square wave: a zigzag between 0 and 1."""
    return 1 - (x - 2 * (0.5 * x).floor() - 1).abs()


def seam(x: Tensor, width: Tensor, gap: float) -> Tensor:
    """The share of `width` round x that lies within `gap` beyond an integer."""
    low, high = x - 0.5 * width, x + 0.5 * width
    return (_filled(high, gap) - _filled(low, gap)) / width


def _filled(x: Tensor, gap: float) -> Tensor:
    floor = x.floor()
    return floor * gap + (x - floor).clamp(max=gap)


def gray(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Plain."""
    return torch.stack((torch.full_like(x, 0.45), torch.full_like(x, 0.45), torch.full_like(x, 0.46)))


def wooden(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Planks along x of different tones, with dark seams."""
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
    tone = 0.46 + 0.075 * wave(0.9 * x, 0.9 * wx) * wave(0.9 * y, 0.9 * wy)
    return torch.stack((tone, tone, tone * 0.98))


def striped(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Broad stripes of a cool and a warm tone, pointing away from the camera."""
    side = wave(1.1 * x, 1.1 * wx)
    return torch.stack((0.50 + 0.03 * side, 0.48 + 0.05 * side, 0.45 + 0.09 * side))


FLOOR = (gray, wooden, checkered, striped)  # in the order of description.FLOORS


def floor(albedo: Tensor, light: Tensor, shadow: Tensor, hidden: Tensor, away: Tensor) -> Tensor:
    """The floor's colour (3, ...): lamp and sky, fading into the backdrop by the squared distance from the middle."""
    lamp = coloured(LAMP, albedo) * (1.15 * light[2] * (1 - shadow))
    colour = albedo * (lamp + coloured(SKY, albedo) * (1 - 0.85 * hidden))
    return colour + (coloured(BACKDROP, albedo) - colour) * smooth(away, 4.0, 150.0)


def coloured(colour: tuple[float, float, float], like: Tensor) -> Tensor:
    """A constant as (3, 1, ...)."""
    return torch.tensor(colour, device=like.device).reshape(3, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------------------------------------------- objects


def lit(albedo: Tensor, normal: Tensor, light: Tensor, shadow: Tensor, hidden: Tensor, height: Tensor) -> Tensor:
    """Colour of a matte surface lit by the lamp, the sky, the floor below, and weakly from behind."""
    lamp = coloured(LAMP, albedo) * (1.35 * _facing(dot(normal, light), 0.15) * (1 - shadow))
    across = (light[0] * light[0] + light[1] * light[1]).sqrt()
    behind = 0.5 - 0.5 * (normal[0] * light[1] - normal[1] * light[0]) / across
    near = smooth(height, -0.3, 0.8)  # just above the floor there is little light
    above = 0.5 + 0.5 * normal[2]
    sky = coloured(SKY, albedo) * (above * (1 - 0.8 * hidden) * (0.55 + 0.45 * near))
    return albedo * (lamp + sky + (0.28 * (1 - above) * near + FILL * behind * behind))


def _facing(cos: Tensor, soft: float) -> Tensor:
    """max(cos, 0) with a smooth corner, as the lamp is wide."""
    dusk = cos + soft
    return torch.where(cos > soft, cos, dusk.clamp(min=0) * dusk / (4 * soft))


def sky(ray: Tensor, light: Tensor) -> Tensor:
    """Brightness of the sky along rays (3, N): a dim ceiling, a bright horizon, a glow round the lamp."""
    up = ray[2]
    glow = smooth(dot(ray, light), 0.5, 1.0)
    return 0.22 + 0.60 * smooth(up, -0.02, 0.30) - 0.50 * smooth(up, 0.30, 0.85) + 1.1 * glow


def polished(dull: Tensor, albedo: Tensor, mirror: Tensor, lamp: Tensor, cos: Tensor) -> Tensor:
    """A coloured mirror over a matte ground, whiter at grazing angles (Schlick, 1994), plus the lamp's mirror image."""
    grazing = (1 - cos).clamp(0, 1)
    grazing = grazing * grazing * grazing * grazing * grazing
    tint = albedo * 1.05 + 0.025
    return dull * 0.42 + mirror * (tint * 1.1 + (1 - tint) * 0.5 * grazing) + lamp


def reflection(ray: Tensor, normal: Tensor) -> Tensor:
    """The ray (3, N) mirrored at a surface."""
    return ray - normal * (2 * dot(ray, normal))


def lamp_in(ray: Tensor, light: Tensor) -> Tensor:
    """Brightness of the lamp in the direction of a mirrored ray."""
    return 1.6 * smooth(dot(ray, light), 0.965, 0.99)


def encoded(colour: Tensor) -> Tensor:
    """Linear light as display values from 0 to 1."""
    return colour.clamp(0, 1).sqrt()
