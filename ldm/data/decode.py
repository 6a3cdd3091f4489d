"""From encoded pictures to pixels: upright, RGB, resized and cropped; no more is decoded than that needs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn.functional import interpolate

LIMIT = 100_000_000  # pixels: 300 MB decoded
LARGEST = 2**30  # bytes of one file
SPARE = 1.5  # a JPEG is decoded at this many times the wanted size or more: within 2/255 of decoding it fully
LONG = 4  # the whole picture is resized before the crop if that makes at most this many times the pixels
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}  # axes to flip; 5 to 8 transpose too
READERS: dict[bytes, type[ImageFile]] = {  # by the first bytes; an animation is read as its first frame
    rb"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    rb"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    rb"RIFF.{4}WEBP": WebPImagePlugin.WebPImageFile,
    rb"GIF8[79]a": GifImagePlugin.GifImageFile,
}


class BadPicture(Exception):
    """Why a picture cannot be used."""


class Picture(NamedTuple):
    """Pixels uint8 (3, H, W), the original size, and the crop's (top, left) corner in the resized picture."""

    pixels: Tensor
    original_size: tuple[int, int]
    crop: tuple[int, int]


@contextmanager
def damage_reported() -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged file into BadPicture."""
    try:
        yield
    except Exception as error:
        raise BadPicture(f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def open_image(data: bytes, limit: int = LIMIT) -> ImageFile:
    """Open a picture by its content, whatever its name, without decoding it or touching PIL's global limit."""
    if not data:
        raise BadPicture("an empty file")
    if data.startswith(b"version https://git-lfs"):
        raise BadPicture("a Git LFS pointer, not the picture")
    reader = next((reader for start, reader in READERS.items() if re.match(start, data, re.DOTALL)), None)
    if reader is None:
        raise BadPicture("not a JPEG, PNG, WebP or GIF")
    with damage_reported():
        image = reader(io.BytesIO(data))
    if image.width * image.height > limit:
        raise BadPicture(f"too many pixels: {image.width}x{image.height}, the limit is {limit:,}")
    return image


def check(data: bytes, limit: int = LIMIT) -> tuple[int, int]:
    """Decode a picture as cheaply as possible to find out what is wrong with it; its size (H, W) when upright."""
    image = open_image(data, limit)
    with damage_reported():
        if image.format == "PNG":
            PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()  # the checksums, which loading ignores
        width, height = image.size
        image.draft("L", (1, 1))
        image.load()
    return (width, height) if orientation(image) >= 5 else (height, width)


def picture(
    data: bytes,
    size: tuple[int, int],
    *,
    corner: tuple[float, float] | None = None,
    flip: bool = False,
    limit: int = LIMIT,
) -> Picture:
    """Resize to cover (H, W) and crop, at the centre or at a `corner` (top, left) in [0, 1)^2 of its possible range.

    As in SDXL, the `crop` that is returned is in pixels of the resized and flipped picture.
    """
    image = open_image(data, limit)
    with damage_reported():
        if image.format != "JPEG":
            image.load()  # a PNG may store its orientation behind its pixels
        turn = orientation(image)
        original = image.size if turn >= 5 else image.size[::-1]  # (height, width)
        resized = cover(original, size)
        spare = resized[0] - size[0], resized[1] - size[1]
        top, left = (int(u * (n + 1)) for u, n in zip(corner, spare)) if corner else (round(n / 2) for n in spare)
        box = top, spare[1] - left if flip and corner else left  # at the centre, an exact mirror image
        scale = original[0] / resized[0], original[1] / resized[1]
        region = box[1] * scale[1], box[0] * scale[0], (box[1] + size[1]) * scale[1], (box[0] + size[0]) * scale[0]
        cut = resample(image, as_stored(region, turn, image.size), size[::-1] if turn >= 5 else size)
        cut = (cut.transpose(1, 2) if turn >= 5 else cut).flip(UPRIGHT[turn])
    return Picture(cut.flip(2) if flip else cut, original, (top, left))


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size (H, W) of the resized picture that covers `size`."""
    (height, width), (h, w) = original, size
    if h * width >= w * height:
        return h, max(w, width * h // height)
    return max(h, height * w // width), w


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if it is missing, damaged or out of range."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except Exception:  # a picture with damaged EXIF is still good
        return 1
    return turn if turn in UPRIGHT else 1


def as_stored(
    region: tuple[float, float, float, float], turn: int, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A region (left, top, right, bottom) of the upright picture, in the stored picture of `size` (width, height)."""
    left, top, right, bottom = region
    if turn >= 5:
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if turn in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def resample(image: Image.Image, region: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """A region of a picture, resized to RGB (3, H, W); JPEGs are decoded at the smallest sufficient scale."""
    width, height = image.size
    left, top, right, bottom = region
    full = round(height * size[0] / (bottom - top)), round(width * size[1] / (right - left))  # (H', W') of all of it
    drafted = image.draft(None, (max(1, round(SPARE * full[1])), max(1, round(SPARE * full[0]))))
    sx, sy = (drafted[1][2] / width, drafted[1][3] / height) if drafted else (1.0, 1.0)
    image = image if image.mode in ("RGB", "L") and not image.has_transparency_data else rgb(image)
    if full[0] * full[1] > LONG * size[0] * size[1]:
        box = max(0, left * sx), max(0, top * sy), min(image.width, right * sx), min(image.height, bottom * sy)
        return pixels(image.resize(size[::-1], Image.Resampling.BILINEAR, box, reducing_gap=2.0))
    y, x = round(top * full[0] / height), round(left * full[1] / width)
    # within 1/255 of PIL's filter and several times faster, except for a small region
    resized = interpolate(pixels(image)[None], full, mode="bilinear", antialias=True)[0]  # (3, H', W')
    return resized[:, y : y + size[0], x : x + size[1]]


def pixels(image: Image.Image) -> Tensor:
    """A picture's pixels (3, H, W), channels last in memory."""
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """Any picture in 8-bit RGB: 16 bits scaled down, transparency over white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
