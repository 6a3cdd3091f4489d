"""Encode and decode large batches in slices, and large pictures in blended tiles.

Slicing does not change the result. Tiling does: GroupNorm and the middle attention see a tile instead of the picture,
so tiles differ in level and contrast. Blending smooths the steps between them; only larger tiles reduce the
differences. tests/models/test_tiling.py states how large they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.models.layers import check_map

MAX_PIXELS = 2**21  # that an autoencoder processes at a time without gradients: 8 pictures of 512x512


def sliced(function: Callable[[Tensor], Tensor], x: Tensor, size: int | None = None) -> Tensor:
    """function(x), `size` samples at a time, or as many as have MAX_PIXELS."""
    size = max(1, MAX_PIXELS // x[0, 0].numel()) if size is None else size
    return torch.cat([function(part) for part in x.split(size)])  # (B, ...)


def tiled_encode(autoencoder: Autoencoder, x: Tensor, tile: int | None = 64, overlap: int | None = None) -> Tensor:
    """`autoencoder.encode(x)` in tiles with sides of `tile` latents that overlap by `overlap` or more."""
    check_map("x", x, autoencoder.in_channels, autoencoder.factor)
    return tiled(autoencoder.encode, x, tile, overlap, unit=autoencoder.factor, unit_out=1)  # (B, Z, h, w)


def tiled_decode(autoencoder: Autoencoder, z: Tensor, tile: int | None = 64, overlap: int | None = None) -> Tensor:
    """`autoencoder.decode(z)` in tiles with sides of `tile` latents that overlap by `overlap` or more."""
    check_map("z", z, autoencoder.latent_channels, 1)
    return tiled(autoencoder.decode, z, tile, overlap, unit=1, unit_out=autoencoder.factor)  # (B, C, H, W)


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, overlap: int | None, unit: int, unit_out: int
) -> Tensor:
    """function(x) blended from tiles; `unit` pixels of x along an axis become `unit_out` of the result."""
    if tile is None:
        return function(x)
    if tile < 1:
        raise ValueError(f"tile: must be positive; got {tile}")
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        expected = f"0 to {tile - 1}"
        raise ValueError(f"overlap: must be less than a tile; got {overlap}; expected {expected}; try {tile // 4}")
    height, width = (size // unit for size in x.shape[2:])
    result = None
    for top, down in parts(height, tile, overlap, unit_out):
        for left, across in parts(width, tile, overlap, unit_out):
            y = sliced(function, x[:, :, span(top, tile, unit), span(left, tile, unit)], 1)  # (B, C, tile_h, tile_w)
            window = down[:, None] * across  # (tile_h, tile_w)
            if result is None:
                dtype = torch.promote_types(y.dtype, window.dtype)
                result = y.new_zeros((*y.shape[:2], height * unit_out, width * unit_out), dtype=dtype)  # (B, C, H, W)
            result[:, :, span(top, tile, unit_out), span(left, tile, unit_out)] += y * window.to(y.device)
    assert result is not None
    return result.to(y.dtype)  # (B, C, H, W)


def parts(size: int, tile: int, overlap: int, unit_out: int) -> list[tuple[int, Tensor]]:
    """The starts of evenly spaced tiles of one length along an axis, and their weights, which sum to one."""
    gaps = -(-max(size - tile, 0) // (tile - overlap))
    length = min(tile, size)
    starts = [i * (size - length) // max(gaps, 1) for i in range(gaps + 1)]
    rise = (torch.arange(length * unit_out) + 0.5) / max(overlap * unit_out, 1)
    window = torch.minimum(rise, rise.flip(0)).clamp(max=1)  # (L,)
    total = torch.zeros(size * unit_out)
    for start in starts:
        total[span(start, tile, unit_out)] += window
    return [(start, window / total[span(start, tile, unit_out)]) for start in starts]


def span(start: int, tile: int, unit: int) -> slice:
    """A tile's pixels along one axis."""
    return slice(start * unit, (start + tile) * unit)
