"""What a batch of pictures lacks of what a conditioner reads: floats, masks, small noisy copies, all keyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import to_device
from ldm.draws import draw, stream
from ldm.pictures import to_float

MADE = ("image", "mask", "low_resolution", "noise_level", "low_resolution_noise")  # from a picture alone
NOISIEST = 350  # of 1000 levels, under which a low-resolution picture is hidden: the SD upscaler's
SMALLEST, LARGEST = 0.25, 0.75  # sides of a random mask, as parts of the picture's


def with_derived(
    batch: Mapping[str, Any], reads: Sequence[str], x0: Tensor, seed: int, factor: int | None = None
) -> dict[str, Any]:
    """The batch with what it lacks, beside latents x0; `factor` makes the low-resolution picture smaller."""
    told = dict(batch)
    if "image" not in batch or not {*MADE} & {*reads}:
        return told
    image = told["image"] = to_float(batch["image"]).to(x0.dtype)  # (B, 3, H, W)
    shape = (image.shape[1], *x0.shape[2:]) if "low_resolution" in reads else ()
    u, noise = draw(stream(seed, "conditions"), batch["number"].tolist(), 5, shape)
    if "mask" in reads and "mask" not in batch:
        told["mask"] = rectangles(u[:, :4], image)
    if "low_resolution" in reads:
        small = x0.shape[2:] if factor is None else [side // factor for side in image.shape[2:]]
        told["low_resolution"] = F.interpolate(image, small, mode="area")  # (B, 3, H/f, W/f)
        told["noise_level"] = to_device((u[:, 4] * NOISIEST).long(), image.device)  # (B,)
        told["low_resolution_noise"] = to_device(noise, image.device).to(image.dtype)  # (B, 3, h, w)
    return told


def rectangles(u: Tensor, like: Tensor) -> Tensor:
    """One rectangle (B, 1, H, W) of ones in each picture, of a size and at a place that u (B, 4) says."""
    u = to_device(u, like.device)
    sides = SMALLEST + (LARGEST - SMALLEST) * u[:, :2]  # (B, 2) height and width
    begins = (1 - sides) * u[:, 2:]  # (B, 2)
    inside = []
    for axis, length in enumerate(like.shape[2:]):
        at = (torch.arange(length, device=like.device) + 0.5) / length  # (H,)
        begin, side = begins[:, axis, None], sides[:, axis, None]  # (B, 1)
        inside.append((at >= begin) & (at < begin + side))  # (B, H), (B, W)
    return (inside[0][:, :, None] & inside[1][:, None]).to(like.dtype)[:, None]
