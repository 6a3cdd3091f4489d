"""Images and maps as a condition: channels that are concatenated to the noisy latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import Condition
from ldm.conditioning.conditioner import Conditioner
from ldm.errors import InputError
from ldm.models.layers import check_positive

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to normalised latents (B, Z, h, w)
Posterior = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # the same to mean and log-variance, not normalised


class Spatial(Conditioner):
    """A condition of `concat_channels` channels; zeros are nothing."""

    def __init__(self, part: str, channels: int, drop: float):
        super().__init__(part, drop)
        self.concat_channels = channels

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return Condition(concat=torch.zeros(count, self.concat_channels, *size))


class Segmentation(Spatial):
    """A map of classes (B, H, W), -1 for unlabelled: how much of each class lies under each latent."""

    reads = ("segmentation",)

    def __init__(
        self,
        *,
        factor: int,
        classes: int,  # of the map
        drop: float = 0.1,  # share of samples that lose it
    ):
        check_positive(classes=classes)
        super().__init__("segmentation", classes, drop)
        self.factor = factor

    def read(self, batch: Mapping[str, Any]) -> Condition:
        labels = batch["segmentation"]
        if labels.ndim != 3 or labels.is_floating_point():
            got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
            raise ValueError(f"segmentation: not a map of classes; got {got}; expected integers of shape (B, H, W)")
        if labels.device.type == "cpu" and not -1 <= int(labels.min()) <= int(labels.max()) < self.concat_channels:
            got, last = f"{int(labels.min())} to {int(labels.max())}", self.concat_channels - 1
            raise InputError("segmentation: no such class", got=got, expected=f"0 to {last}, or -1 for none")
        check_factor("segmentation", labels, self.factor)
        planes = F.one_hot(labels + 1, self.concat_channels + 1)[..., 1:].permute(0, 3, 1, 2).float()  # (B, K, H, W)
        return Condition(concat=F.avg_pool2d(planes, self.factor))  # (B, K, h, w)


class MaskedImage(Spatial):
    """Stable Diffusion's inpainting: the mask (1 is painted anew), then the latents of the image without it."""

    reads = ("image", "mask")

    def __init__(
        self,
        *,
        encode: Encode,
        latent_channels: int,
        drop: float = 0.0,  # share of samples that lose it
    ):
        super().__init__("masked_image", 1 + latent_channels, drop)
        self.encode = encode

    def read(self, batch: Mapping[str, Any]) -> Condition:
        image, mask = batch["image"], batch["mask"]
        expected = (len(image), 1, *image.shape[2:])
        if mask.shape != expected:
            raise ValueError(f"mask: not of the image's size; got shape {tuple(mask.shape)}; expected {expected}")
        mask = (mask >= 0.5).to(image.dtype)  # (B, 1, H, W)
        latents = self.encode(image * (1 - mask))  # (B, Z, h, w)
        return Condition(concat=torch.cat((F.interpolate(mask, latents.shape[2:]), latents), 1))  # (B, 1 + Z, h, w)


class Edit(Spatial):
    """InstructPix2Pix (Brooks et al., 2023): the latents of the image to edit, not normalised, as it was trained."""

    reads = ("source",)

    def __init__(
        self,
        *,
        posterior: Posterior,
        latent_channels: int,
        drop: float = 0.05,  # share of samples that lose it
    ):
        super().__init__("edit", latent_channels, drop)
        self.posterior = posterior

    def read(self, batch: Mapping[str, Any]) -> Condition:
        return Condition(concat=self.posterior(batch["source"])[0])  # (B, Z, h, w)


class LowResolution(Spatial):
    """A small image of the latents' size under noise of a level that the backbone is told (Ho et al., 2022, 4.2).

    Noise comes in the batch, for nothing is drawn here; the levels are those of the SD upscaler's 1000 steps.
    Nothing is an image lost in noise: zeros at the last level.
    """

    reads = ("low_resolution", "noise_level", "low_resolution_noise")
    abar: Tensor

    def __init__(
        self,
        *,
        channels: int = 3,  # of the small image
        levels: int = 1000,  # of its noise
        start: float = 1e-4,  # the first beta
        end: float = 0.02,  # the last
        drop: float = 0.0,  # share of samples that lose it
    ):
        check_positive(channels=channels, levels=levels)
        if not 0 < start <= end < 1:
            raise ValueError(f"start: no schedule of noise; got {start} to end {end}; expected 0 < start <= end < 1")
        super().__init__("low_resolution", channels, drop)
        self.classes = levels
        betas = torch.linspace(start**0.5, end**0.5, levels, dtype=torch.float64, device="cpu").square()
        self.register_buffer("abar", (1 - betas).cumprod(0).float(), persistent=False)

    def read(self, batch: Mapping[str, Any]) -> Condition:
        image, level, noise = (batch[key] for key in self.reads)
        if level.shape != image.shape[:1] or level.is_floating_point():
            got = f"{str(level.dtype).removeprefix('torch.')} of shape {tuple(level.shape)}"
            raise ValueError(f"noise_level: not one integer per image; got {got}; expected shape ({len(image)},)")
        if level.device.type == "cpu" and not 0 <= int(level.min()) <= int(level.max()) < len(self.abar):
            got, last = f"{int(level.min())} to {int(level.max())}", len(self.abar) - 1
            raise InputError("noise_level: no such level", got=got, expected=f"0 to {last}", hint="20")
        if noise.shape != image.shape:
            shapes = f"got {tuple(noise.shape)}; expected {tuple(image.shape)}"
            raise ValueError(f"low_resolution_noise: not of the image's size; {shapes}")
        abar = self.abar.to(image.device)[level].to(image.dtype)[:, None, None, None]  # (B, 1, 1, 1)
        return Condition(concat=abar.sqrt() * image + (1 - abar).sqrt() * noise, pooled=level)  # (B, C, h, w), (B,)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        device = self.abar.device
        last = torch.full((count,), len(self.abar) - 1, device=device)
        return Condition(concat=torch.zeros(count, self.concat_channels, *size, device=device), pooled=last)


def check_factor(name: str, x: Tensor, factor: int) -> None:
    """Refuse a map that does not divide into latents."""
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        got, expected = f"{height}x{width}", f"multiples of {factor}"
        raise ValueError(f"{name}: size not divisible; got {got}; expected {expected}; try {near[0]}x{near[1]}")
