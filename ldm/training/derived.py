"""Conditions that come from the picture itself: what to paint anew, and what to make larger."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.draws import draw, stream

HOLES = 4  # at most, in a mask
MOST_NOISE = 350  # of 1000 levels, on the small picture of a super-resolution model (Rombach et al.'s x4 upscaler)
UNIFORMS = 2 + 4 * HOLES


def derived(batch: Mapping[str, Any], reads: Collection[str], seed: int, factor: int) -> dict[str, Tensor]:
    """What a conditioner reads and the data do not bring, from batch["image"] in [-1, 1], drawn by sample number."""
    missing = {name for name in reads if name not in batch}
    made: dict[str, Tensor] = {}
    if "low_resolution" in missing:
        made["low_resolution"] = F.avg_pool2d(batch["image"], factor)  # (B, 3, h, w)
    small = {**batch, **made}.get("low_resolution")
    shape = small.shape[1:] if small is not None and "low_resolution_noise" in missing else (0,)
    u, noise = draw(stream(seed, "condition"), batch["number"].tolist(), UNIFORMS, shape)
    if "mask" in missing:
        made["mask"] = holes(u[:, 1:], batch["image"].shape[2:])
    if "noise_level" in missing:
        made["noise_level"] = (u[:, 0] * MOST_NOISE).long()  # (B,)
    if "low_resolution_noise" in missing:
        made["low_resolution_noise"] = noise
    return {name: x.to(batch["image"].device, non_blocking=True) for name, x in made.items()}


def holes(u: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (B, 1, H, W), 1 in one to four rectangles whose sides are an eighth to a half of the picture's."""
    count = 1 + (u[:, :1] * HOLES).long()  # (B, 1)
    sides, places = u[:, 1:].unflatten(1, (HOLES, 2, 2)).unbind(2)  # (B, N, 2) twice
    sides = 1 / 8 + 3 / 8 * sides
    first = places * (1 - sides)
    inside = []
    for axis, length in enumerate(size):
        centres = (torch.arange(length) + 0.5) / length  # (H,) or (W,)
        begin, end = (x[..., axis, None] for x in (first, first + sides))  # (B, N, 1)
        inside.append((centres >= begin) & (centres < end))  # (B, N, H), (B, N, W)
    there = torch.arange(HOLES) < count  # (B, N)
    covered = inside[0][..., None] & inside[1][..., None, :] & there[..., None, None]  # (B, N, H, W)
    return covered.any(1, keepdim=True).float()
