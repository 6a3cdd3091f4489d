"""Light on the floor and on objects: one soft lamp, a bright sky all round, and what shiny things mirror.

Written, as shapes.py is, with operations that are rounded alike everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.scenes.shapes import box_outline, dot, round_outline, smooth

LAMP, SKY = (0.84, 0.80, 0.74), (0.40, 0.42, 0.46)  # warm and cool
FILL = 0.16  # a weak light from beside the lamp
SOFT = 0.11  # half of the lamp's width over its distance: what makes a shadow's edge wider the further it falls
BACKDROP = (0.50, 0.53, 0.58)  # what the floor fades into


def occlusion(p: Tensor, centre: Tensor, light: Tensor, outline: Tensor, box: bool) -> Tensor:
    """How much of the lamp an object hides from points p (3, ...), from 0 to 1."""
    to = p - centre
    beyond = box_outline(to, outline) if box else round_outline(to, outline)
    towards = -dot(to, light)  # how far along the light the object is
    edge = SOFT * towards.clamp(min=0.08)
    return smooth(-beyond, -edge, edge) * (towards > 0)


def closeness(p: Tensor, normal: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The part of the sky above p that a ball in the object's place hides: cos / distance^2 (its form factor)."""
    to = centre - p
    square = dot(to, to).clamp(min=1e-4)
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
    tone = 0.46 + 0.075 * wave(0.9 * x, 0.9 * wx) * wave(0.9 * y, 0.9 * wy)
    return torch.stack((tone, tone, tone * 0.98))


def striped(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Broad stripes away from the camera, of a cool and a warm tone."""
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
    """A dull surface's colour: the lamp, the sky above, the floor's light from below, and a little from behind."""
    lamp = coloured(LAMP, albedo) * (1.35 * _facing(dot(normal, light), 0.15) * (1 - shadow))
    across = (light[0] * light[0] + light[1] * light[1]).sqrt()
    behind = 0.5 - 0.5 * (normal[0] * light[1] - normal[1] * light[0]) / across
    near = smooth(height, -0.3, 0.8)  # just above the floor there is little light
    above = 0.5 + 0.5 * normal[2]
    sky = coloured(SKY, albedo) * (above * (1 - 0.8 * hidden) * (0.55 + 0.45 * near))
    return albedo * (lamp + sky + (0.28 * (1 - above) * near + FILL * behind * behind))


def _facing(cos: Tensor, soft: float) -> Tensor:
    """cos where positive, without the crease: a wide lamp sets slowly."""
    dusk = cos + soft
    return torch.where(cos > soft, cos, dusk.clamp(min=0) * dusk / (4 * soft))


def sky(ray: Tensor, light: Tensor) -> Tensor:
    """What a mirrored ray (3, N) sees above: a dim ceiling, a bright horizon, a glow where the lamp is."""
    up = ray[2]
    glow = smooth(dot(ray, light), 0.5, 1.0)
    return 0.22 + 0.60 * smooth(up, -0.02, 0.30) - 0.50 * smooth(up, 0.30, 0.85) + 1.1 * glow


def polished(dull: Tensor, albedo: Tensor, mirror: Tensor, lamp: Tensor, cos: Tensor) -> Tensor:
    """A coloured mirror over a dull ground, whiter at grazing angles (Schlick, 1994), and the lamp in it."""
    grazing = (1 - cos).clamp(0, 1)
    grazing = grazing * grazing * grazing * grazing * grazing
    tint = albedo * 1.05 + 0.025
    return dull * 0.42 + mirror * (tint * 1.1 + (1 - tint) * 0.5 * grazing) + lamp


def reflection(ray: Tensor, normal: Tensor) -> Tensor:
    """The ray (3, N) mirrored at a surface."""
    return ray - normal * (2 * dot(ray, normal))


def lamp_in(ray: Tensor, light: Tensor) -> Tensor:
    """How brightly a mirrored ray meets the lamp."""
    return 1.6 * smooth(dot(ray, light), 0.965, 0.99)


def encoded(colour: Tensor) -> Tensor:
    """Linear light to what a screen shows, from 0 to 1."""
    return colour.clamp(0, 1).sqrt()
