"""Images and maps as a condition: channels that are concatenated to the noisy latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.condition import Condition, Vector
from ldm.conditioning.conditioner import Conditioner
from ldm.errors import InputError
from ldm.models.layers import check_positive, check_sides

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to normalised latents (B, Z, h, w)
Posterior = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # the same to mean and log-variance, not normalised


class Spatial(Conditioner):
    """A condition of `concat_channels` channels; the null is zeros."""

    def __init__(self, part: str, channels: int, drop: float):
        super().__init__(part, drop)
        self.concat_channels = channels

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return Condition(concat=torch.zeros(count, self.concat_channels, *size))


class Segmentation(Spatial):
    """A map of classes (B, H, W), -1 for unlabelled: the share of each class under each latent."""

    reads = ("segmentation",)

    def __init__(
        self,
        *,
        latent_factor: int,
        classes: int,  # classes of the map
        drop: float = 0.1,  # share of samples without it
    ):
        check_positive(classes=classes)
        super().__init__("segmentation", classes, drop)
        self.latent_factor = latent_factor

    def read(self, batch: Mapping[str, Any]) -> Condition:
        labels = batch["segmentation"]
        if labels.ndim != 3 or labels.is_floating_point():
            got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
            raise ValueError(f"segmentation: not a map of classes; got {got}; expected integers of shape (B, H, W)")
        if labels.device.type == "cpu" and not -1 <= int(labels.min()) <= int(labels.max()) < self.concat_channels:
            got, last = f"{int(labels.min())} to {int(labels.max())}", self.concat_channels - 1
            raise InputError("segmentation: no such class", got=got, expected=f"0 to {last}, or -1 for none")
        check_sides("segmentation", labels, self.latent_factor)
        planes = F.one_hot(labels + 1, self.concat_channels + 1)[..., 1:].permute(0, 3, 1, 2).float()  # (B, K, H, W)
        return Condition(concat=F.avg_pool2d(planes, self.latent_factor))  # (B, K, h, w)


class MaskedImage(Spatial):
    """Stable Diffusion's inpainting: the mask (1 is repainted), then the latents of the masked image."""

    reads = ("image", "mask")

    def __init__(
        self,
        *,
        encode: Encode,
        latent_channels: int,
        drop: float = 0.0,  # share of samples without it
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
    """InstructPix2Pix (Brooks et al., 2023): the latents of the image to edit, not normalised, as in its training."""

    reads = ("source",)

    def __init__(
        self,
        *,
        posterior: Posterior,
        latent_channels: int,
        drop: float = 0.05,  # share of samples without it
    ):
        super().__init__("edit", latent_channels, drop)
        self.posterior = posterior

    def read(self, batch: Mapping[str, Any]) -> Condition:
        return Condition(concat=self.posterior(batch["source"])[0])  # (B, Z, h, w)


class LowResolution(Spatial):
    """A smaller copy of the picture, resized to the latents and noised (Ho et al., 2022, 4.2), and its noise level.

    Levels are those of the SD upscaler's 1000 steps. The noise comes in the batch, because nothing is drawn here. The
    null is pure noise: zeros at the last level.
    """

    reads = ("low_resolution", "noise_level", "low_resolution_noise")
    abar: Tensor

    def __init__(
        self,
        *,
        latent_factor: int,
        factor: int | None = None,  # how many times smaller it is than the picture; null is the autoencoder's factor
        channels: int = 3,  # of the low-resolution picture
        levels: int = 1000,  # of its noise
        table: bool = True,  # the backbone has a table of levels as in the SD upscaler; false embeds sinusoids
        start: float = 1e-4,  # the first beta
        end: float = 0.02,  # the last beta
        drop: float = 0.0,  # share of samples without it
    ):
        check_positive(channels=channels, levels=levels)
        factor = latent_factor if factor is None else factor
        if factor < 2:
            expected = "2 or more, as there is no autoencoder" if latent_factor == 1 else "2 or more"
            raise ValueError(f"factor: too small; got {factor}; expected {expected}; try 4")
        if not 0 < start <= end < 1:
            raise ValueError(f"start: not a noise schedule; got {start} to end {end}; expected 0 < start <= end < 1")
        super().__init__("low_resolution", channels, drop)
        self.low_resolution_factor, self.latent_factor = factor, latent_factor
        self.vectors = {"noise_level": Vector("index", levels) if table else Vector("numbers", 1)}
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
        image = self.resize(image)  # (B, C, h, w)
        if noise.shape != image.shape:
            shapes = f"got {tuple(noise.shape)}; expected {tuple(image.shape)}"
            raise ValueError(f"low_resolution_noise: not of the latents' size; {shapes}")
        abar = self.abar.to(image.device)[level].to(image.dtype)[:, None, None, None]  # (B, 1, 1, 1)
        return Condition(concat=abar.sqrt() * image + (1 - abar).sqrt() * noise, vectors=self.level_vector(level))

    def resize(self, image: Tensor) -> Tensor:
        """The picture at the size of the latents."""
        factor = self.low_resolution_factor
        assert factor is not None
        if factor == self.latent_factor:
            return image
        size = [side * factor // self.latent_factor for side in image.shape[2:]]
        if factor < self.latent_factor:
            return F.interpolate(image, size, mode="area")
        return F.interpolate(image, size, mode="bilinear")

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        device = self.abar.device
        last = torch.full((count,), len(self.abar) - 1, device=device)
        return Condition(
            concat=torch.zeros(count, self.concat_channels, *size, device=device), vectors=self.level_vector(last)
        )

    def level_vector(self, level: Tensor) -> dict[str, Tensor]:
        """The level as the backbone reads it."""
        return {"noise_level": level if self.vectors["noise_level"].kind == "index" else level.float()}
