"""Pictures that decoders find as hard as photographs: smooth gradients, edges and noise."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int = 0, noise: float = 8.0) -> Image.Image:
    """Waves of all directions and lengths, hard-edged patches, and grain."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(8):
        angle, phase = random.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * 2 ** (octave / 2) * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        pixels += wave[..., None] * random.normal(0, 40 / (1 + octave / 2), 3)
    for _ in range(6):
        top, left, bottom, right = (random.uniform(0, 1, 4) * (height, width, height, width)).astype(int)
        pixels[min(top, bottom) : max(top, bottom), min(left, right) : max(left, right)] += random.normal(0, 40, 3)
    pixels += random.normal(0, noise, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, form, **({"quality": 90} if form == "JPEG" else {}) | options)
    return file.getvalue()
