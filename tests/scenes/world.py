"""A second implementation of scenes, in numpy: where the camera is, what is inside of what, and what rays meet.

It knows nothing of quadratics or slabs: a ray is walked in small steps, and each point is asked whether it is inside.
"""

from __future__ import annotations

import math

import numpy as np

from ldm.scenes import Object, Scene

RADIUS = {"small": 0.5, "large": 0.85}
WIDTH = {"sphere": 0.9, "cube": 0.78, "cylinder": 0.72, "cone": 0.88}
HEIGHT = {"sphere": 0.9, "cube": 0.78, "cylinder": 0.82, "cone": 1.0}
FOCAL, LOOKS_AT = 3.4, 0.5


def half_height(thing: Object) -> float:
    return RADIUS[thing.size] * HEIGHT[thing.shape]


def inside(thing: Object, p: np.ndarray) -> np.ndarray:
    """Which points (..., 3) lie in the object."""
    width, height = RADIUS[thing.size] * WIDTH[thing.shape], half_height(thing)
    x, y, z = p[..., 0] - thing.x, p[..., 1] - thing.y, p[..., 2] - thing.z
    if thing.shape == "sphere":
        return x**2 + y**2 + z**2 < width**2
    if thing.shape == "cube":
        angle = math.radians(-thing.turn)
        x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
        return (abs(x) < width) & (abs(y) < width) & (abs(z) < width)
    radius = width * (height - z) / (2 * height) if thing.shape == "cone" else width
    return (np.hypot(x, y) < radius) & (abs(z) < height)


def camera(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The eye, and a matrix whose rows are right, up and forward."""
    a, e = math.radians(scene.camera.azimuth), math.radians(scene.camera.elevation)
    forward = np.array([-math.sin(a) * math.cos(e), math.cos(a) * math.cos(e), -math.sin(e)])
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    eye = np.array([0, 0, LOOKS_AT]) - scene.camera.distance * forward
    return eye, np.stack([right, np.cross(right, forward), forward])


def pictured(scene: Scene, p: np.ndarray) -> np.ndarray:
    """A point (..., 3) as right, down (0 to 1) and depth."""
    eye, axes = camera(scene)
    right, up, depth = np.moveaxis((p - eye) @ axes.T, -1, 0)
    return np.stack([0.5 + 0.5 * FOCAL * right / depth, 0.5 - 0.5 * FOCAL * up / depth, depth], -1)


def walked(scene: Scene, size: int, step: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """The mask (H, W), 0 for the floor, and the depth of what is met through the middle of each pixel."""
    eye, axes = camera(scene)
    place = (np.arange(size) + 0.5) / size * 2 - 1
    across, down = np.meshgrid(place / FOCAL, place / FOCAL)
    ray = axes[2] + across[..., None] * axes[0] - down[..., None] * axes[1]
    mask, depth = np.zeros((size, size), int), -eye[2] / ray[..., 2]
    for t in np.arange(scene.camera.distance - 4, scene.camera.distance + 4, step)[::-1]:
        for i, thing in enumerate(scene.objects):
            met = inside(thing, eye + t * ray)
            mask[met], depth[met] = i + 1, t
    return mask, depth


def towards_light(scene: Scene) -> np.ndarray:
    azimuth, elevation = math.radians(scene.light.azimuth + 90 * scene.time), math.radians(scene.light.elevation)
    flat = math.cos(elevation)
    return np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)])


def shaded(scene: Scene, p: np.ndarray, thing: Object, step: float = 0.02) -> np.ndarray:
    """Which points (..., 3) do not see the middle of the lamp because of this object."""
    light = towards_light(scene)
    hidden = np.zeros(p.shape[:-1], bool)
    for t in np.arange(step, 6, step):
        hidden |= inside(thing, p + t * light)
    return hidden
