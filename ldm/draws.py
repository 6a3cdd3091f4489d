"""All randomness of a training sample as a pure function of (seed, number), the same on every device and rank count."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def mix32(seed: int, number: int) -> int:
    """A 32-bit hash of two integers; torch's CPU generator uses only 32 bits of its seed."""
    x = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 32


def stream(seed: int, name: str) -> int:
    """A separate seed for each use of randomness, so that a sample's flip is independent of its noise level."""
    return mix32(seed, zlib.crc32(name.encode()))


def keyed(generator: torch.Generator, seed: int, number: int) -> torch.Generator:
    """The generator, reseeded for sample `number`."""
    return generator.manual_seed(mix32(seed, number))


def draw(seed: int, numbers: Iterable[int], uniforms: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Uniform numbers (B, uniforms) in float64 and normal ones (B, *shape), drawn in this order for each sample."""
    numbers, generator = list(numbers), torch.Generator()
    u = torch.empty(len(numbers), uniforms, dtype=torch.float64)
    noise = torch.empty(len(numbers), *shape)
    for i, number in enumerate(numbers):
        keyed(generator, seed, number)
        u[i].uniform_(generator=generator)
        noise[i].normal_(generator=generator)
    return u, noise
