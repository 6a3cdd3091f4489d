"""Pictures as PIL images, as tensors in [-1, 1], and as PNG files that store how they were made."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from ldm.errors import InputError

LINE = 15  # pixels between the lines of a caption


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], with one or three channels, as pictures."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
    return [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3]) for array in arrays]


def to_float(images: Tensor) -> Tensor:
    """Pictures uint8 (..., C, H, W) as float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place: allocating is what costs


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1], resized to (height, width)."""
    image = upright(image).convert("RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (1, 3, H, W)


def to_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as a mask (1, 1, H, W): 1 where it is brighter than half, which is where to repaint."""
    gray = upright(image).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
    return (torch.from_numpy(np.array(gray))[None, None] >= 128).float()  # (1, 1, H, W)


def to_classes(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture whose palette index or gray value is the class, as a map (1, H, W); 255 is unlabelled, here -1."""
    image = ImageOps.exif_transpose(image)
    classes = image if image.mode in ("P", "L") else image.convert("L")
    classes = classes.resize(size[::-1], Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(classes)).long()[None]  # (1, H, W)
    return torch.where(labels == 255, -1, labels)


def upright(image: Image.Image) -> Image.Image:
    """A picture turned by its EXIF orientation, in 8 bits: PIL would clip one of 16 bits to white."""
    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def read(file: str | Path) -> Image.Image:
    """Open a picture file."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError("no such picture", str(file)) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("cannot read the picture", str(file), got=str(error).splitlines()[0]) from None


def write(image: Image.Image, file: Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a PNG with text chunks, in full or not at all."""
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


def grid(images: Sequence[Image.Image], columns: int | None = None, captions: Sequence[str] = ()) -> Image.Image:
    """Pictures on one sheet, about as many rows as columns; a caption below each, cut off after three lines."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = images[0].size
    texts = [textwrap.wrap(text, max(8, width // 6), max_lines=3, placeholder="...") for text in captions]
    strip = LINE * max((len(lines) for lines in texts), default=0)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + strip)))
    for i, image in enumerate(images):
        cell = Image.new("RGB", (width, height + strip), "white")
        cell.paste(image)
        if captions:
            ImageDraw.Draw(cell).multiline_text((2, height), "\n".join(texts[i]), "black", ImageFont.load_default(11))
        sheet.paste(cell, (i % columns * width, i // columns * (height + strip)))
    return sheet
