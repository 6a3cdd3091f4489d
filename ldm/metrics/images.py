"""Similarity of pairs of pictures in [-1, 1]: PSNR, SSIM and LPIPS, one number per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.signal.windows import gaussian

RANGE = 2.0  # from -1 to 1


def measures(x: Tensor, y: Tensor, lpips: nn.Module | None = None) -> dict[str, Tensor]:
    """Every available measure of pictures, clipped to [-1, 1], in float32 even under autocast."""
    x, y = (picture.float().clamp(-1, 1) for picture in (x, y))  # (B, C, H, W)
    with torch.autocast(x.device.type, enabled=False):
        found = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
        return found if lpips is None else {**found, "lpips": lpips(x, y)}  # (B,) each


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    return 10 * torch.log10(RANGE**2 / (x - y).square().mean((1, 2, 3)))  # (B,)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), averaged over the windows inside the picture."""
    x, y = (picture / RANGE + 0.5 for picture in (x, y))  # (B, C, H, W) in [0, 1], where K1 = 0.01 and K2 = 0.03 hold
    window = gaussian(min(11, *x.shape[2:]), std=1.5, dtype=torch.float64)
    moments = blur(torch.cat((x, y, x * x, y * y, x * y)), (window / window.sum()).to(x))  # (5B, C, h, w)
    mean_x, mean_y, xx, yy, xy = moments.chunk(5)  # (B, C, h, w) each
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean((1, 2, 3))  # (B,)


def blur(x: Tensor, window: Tensor) -> Tensor:
    """Every channel convolved with the window along both axes, without padding."""
    planes = x.flatten(0, 1)[:, None]  # (B*C, 1, H, W)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[2:])  # (B, C, h, w)


def gradient_energy(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, which blurring reduces."""
    return x.diff(dim=2).square().mean((1, 2, 3)) + x.diff(dim=3).square().mean((1, 2, 3))  # (B,)
