"""Conditions that are derived from a batch's pictures: masks and noisy low-resolution copies, keyed by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import to_device
from ldm.draws import draw, stream
from ldm.pictures import to_float

DERIVED = ("image", "mask", "low_resolution", "noise_level", "low_resolution_noise")  # made from a picture alone
NOISIEST = 350  # of 1000: the highest noise level on a low-resolution picture, as in SD's upscaler
SMALLEST, LARGEST = 0.25, 0.75  # sides of a random mask, as a share of the picture's


def derived_draws(batch: Mapping[str, Any], reads: Sequence[str], shape: Sequence[int], seed: int) -> dict[str, Tensor]:
    """The random part of the derived conditions for latents of `shape` (h, w), keyed by number; made by a worker."""
    if "image" not in batch or not {*DERIVED} & {*reads}:
        return {}
    low = "low_resolution" in reads
    shape = (batch["image"].shape[1], *shape) if low else ()
    u, noise = draw(stream(seed, "conditions"), batch["number"].tolist(), 5, shape)
    draws = {"noise_level": (u[:, 4] * NOISIEST).long(), "low_resolution_noise": noise} if low else {}
    return draws | ({"mask_uniforms": u[:, :4]} if "mask" in reads and "mask" not in batch else {})


def with_derived(
    batch: Mapping[str, Any], reads: Sequence[str], x0: Tensor, seed: int = 0, factor: int | None = None
) -> dict[str, Any]:
    """The batch with the conditions that a picture gives, on its device; draws that it lacks are made with `seed`.

    A low-resolution picture is `factor` times smaller than the picture; without a factor, it has the size of x0.
    """
    if "image" not in batch or not {*DERIVED} & {*reads}:
        return dict(batch)
    image = to_float(batch["image"]).to(x0.dtype)  # (B, 3, H, W)
    made = {"image": image}
    prepared = "mask_uniforms" in batch or "low_resolution_noise" in batch
    draws = batch if prepared else derived_draws(batch, reads, x0.shape[2:], seed)
    if "mask" in reads and "mask" not in batch:
        made["mask"] = rectangles(draws["mask_uniforms"], image)
    if "low_resolution" in reads:
        small = x0.shape[2:] if factor is None else [side // factor for side in image.shape[2:]]
        made["low_resolution"] = F.interpolate(image, small, mode="area")  # (B, 3, H/f, W/f)
        made["noise_level"] = to_device(draws["noise_level"], image.device)  # (B,)
        made["low_resolution_noise"] = to_device(draws["low_resolution_noise"], image.device).to(image.dtype)
    return {**batch, **made}


def rectangles(u: Tensor, like: Tensor) -> Tensor:
    """One rectangle of ones per picture (B, 1, H, W); u (B, 4) in [0, 1) gives its height, width, top and left."""
    u = to_device(u, like.device)
    sides = SMALLEST + (LARGEST - SMALLEST) * u[:, :2]  # (B, 2) height and width
    corners = (1 - sides) * u[:, 2:]  # (B, 2) top and left
    inside = []
    for axis, length in enumerate(like.shape[2:]):
        at = (torch.arange(length, device=like.device) + 0.5) / length  # (H,)
        start, side = corners[:, axis, None], sides[:, axis, None]  # (B, 1)
        inside.append((at >= start) & (at < start + side))  # (B, H), (B, W)
    return (inside[0][:, :, None] & inside[1][:, None]).to(like.dtype)[:, None]
