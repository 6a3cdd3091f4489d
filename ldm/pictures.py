"""Pictures between PIL, tensors in [-1, 1] and PNG files that remember how they were made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from ldm.errors import InputError


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], of one or three channels, to pictures."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
    return [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3]) for array in arrays]


def to_float(images: Tensor) -> Tensor:
    """Pictures uint8 (..., C, H, W) as float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place: large buffers cost more than sums


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1], resized to (height, width)."""
    image = upright(image).convert("RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (1, 3, H, W)


def to_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (1, 1, H, W): 1 where it is brighter than half, which is what is to be repainted."""
    gray = upright(image).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
    return (torch.from_numpy(np.array(gray))[None, None] >= 128).float()  # (1, 1, H, W)


def to_classes(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture whose palette or gray value is a class, as a map (1, H, W) with 255 for unlabelled."""
    image = ImageOps.exif_transpose(image)
    classes = image if image.mode in ("P", "L") else image.convert("L")
    classes = classes.resize(size[::-1], Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(classes)).long()[None]  # (1, H, W)
    return torch.where(labels == 255, -1, labels)


def upright(image: Image.Image) -> Image.Image:
    """A picture as it is looked at, of 8 bits: of 16, PIL's own conversion would leave white alone."""
    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def read(file: str | Path) -> Image.Image:
    """Open a picture, or say in one line why not."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError("no such picture", str(file)) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("cannot read the picture", str(file), got=str(error).splitlines()[0]) from None


def write(image: Image.Image, file: Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """A PNG with texts in it, all or nothing."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        image.save(unfinished, "PNG", pnginfo=info)
        unfinished.replace(file)
    except OSError as error:
        raise InputError("cannot write the picture", str(file), got=error.strerror or str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures side by side on one sheet, as near to a square as they go."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
