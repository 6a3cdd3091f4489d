"""Encoded pictures to pixels: upright, in three channels, cut to size, with as little decoded as that needs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn.functional import interpolate

LIMIT = 100_000_000  # pixels: 300 MB decoded
LARGEST = 2**30  # bytes of one file
SPARE = 1.5  # a JPEG is drafted at no less than this many times the size wanted: under 2/255 from the full path
LONG = 4  # a picture is resized as a whole where that makes at most this many times the pixels that are kept
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}  # axes to flip, from 5 on transposed


class BadPicture(Exception):
    """Why a picture cannot be used."""


class Verdict(NamedTuple):
    """A picture's size when upright, or what is wrong with it."""

    height: int
    width: int
    problem: str = ""


class Picture(NamedTuple):
    """Pixels uint8 (3, H, W), the size before resizing, and where the crop begins (top, left) in the resized one."""

    pixels: Tensor
    original_size: tuple[int, int]
    crop: tuple[int, int]


@contextmanager
def blame() -> Iterator[None]:
    """Whatever a damaged file makes a decoder raise, as what is wrong with the picture."""
    try:
        yield
    except BadPicture:
        raise
    except Exception as error:
        raise BadPicture(f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def open_image(data: bytes, limit: int = LIMIT) -> ImageFile:
    """A JPEG, PNG or WebP by its content, whatever its name; nothing is decoded yet, and no global limit is touched."""
    if not data:
        raise BadPicture("an empty file")
    if data.startswith(b"version https://git-lfs"):
        raise BadPicture("a Git LFS pointer, not the picture")
    with blame():
        image = reader(data)(io.BytesIO(data))
    if image.width * image.height > limit:
        raise BadPicture(f"too many pixels: {image.width}x{image.height}, the limit is {limit:,}")
    return image


def reader(data: bytes) -> type[ImageFile]:
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    raise BadPicture("not a JPEG, PNG or WebP")


def check(data: bytes, limit: int = LIMIT) -> Verdict:
    """Read all of a picture as cheaply as finds what is wrong with it."""
    try:
        image = open_image(data, limit)
        with blame():
            if image.format == "PNG":
                PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()  # the checksums, which loading ignores
            width, height = image.size
            image.draft("L", (1, 1))
            image.load()
    except BadPicture as error:
        return Verdict(0, 0, str(error))
    return Verdict(width, height) if orientation(image) >= 5 else Verdict(height, width)


def picture(
    data: bytes,
    size: tuple[int, int],
    *,
    place: tuple[float, float] | None = None,
    flip: bool = False,
    limit: int = LIMIT,
) -> Picture:
    """Resized to cover (H, W) and cropped, at the centre or at a `place` in [0, 1)^2 of the room there is.

    As in SDXL, `crop` counts in the resized picture, the flipped one where it is flipped.
    """
    image = open_image(data, limit)
    with blame():
        if image.format != "JPEG":
            image.load()  # a PNG may say behind its pixels how it is turned
        turn = orientation(image)
        original = image.size if turn >= 5 else image.size[::-1]  # (height, width)
        resized = cover(original, size)
        room = resized[0] - size[0], resized[1] - size[1]
        top, left = (int(u * (n + 1)) for u, n in zip(place, room)) if place else (round(n / 2) for n in room)
        box = top, room[1] - left if flip and place else left  # at the centre, a mirror image to the pixel
        scale = original[0] / resized[0], original[1] / resized[1]
        region = box[1] * scale[1], box[0] * scale[0], (box[1] + size[1]) * scale[1], (box[0] + size[0]) * scale[0]
        cut = resample(image, lying(region, turn, image.size), size[::-1] if turn >= 5 else size)
        cut = (cut.transpose(1, 2) if turn >= 5 else cut).flip(UPRIGHT[turn])
    return Picture(cut.flip(2) if flip else cut, original, (top, left))


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The size (H, W) of a picture when it is made as small as still covers `size`."""
    (height, width), (h, w) = original, size
    if h * width >= w * height:
        return h, max(w, width * h // height)
    return max(h, height * w // width), w


def orientation(image: Image.Image) -> int:
    """How the picture is turned, 1 to 8 as in EXIF; 1 where that is damaged or nonsense."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except Exception:  # a picture is good without its EXIF, whatever that makes the reader raise
        return 1
    return turn if turn in UPRIGHT else 1


def lying(
    region: tuple[float, float, float, float], turn: int, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A region (left, top, right, bottom) of the upright picture, in the stored one, whose size is (width, height)."""
    left, top, right, bottom = region
    if turn >= 5:
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if turn in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def resample(image: Image.Image, region: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """A region of a picture in RGB (3, H, W); JPEGs are decoded at the smallest scale that is good enough."""
    width, height = image.size
    left, top, right, bottom = region
    whole = round(height * size[0] / (bottom - top)), round(width * size[1] / (right - left))  # (H', W') of all of it
    drafted = image.draft(None, (max(1, round(SPARE * whole[1])), max(1, round(SPARE * whole[0]))))
    sx, sy = (drafted[1][2] / width, drafted[1][3] / height) if drafted else (1.0, 1.0)
    image = image if image.mode in ("RGB", "L") and not image.has_transparency_data else rgb(image)
    if whole[0] * whole[1] > LONG * size[0] * size[1]:
        box = max(0, left * sx), max(0, top * sy), min(image.width, right * sx), min(image.height, bottom * sy)
        return pixels(image.resize(size[::-1], Image.Resampling.BILINEAR, box, reducing_gap=2.0))
    y, x = round(top * whole[0] / height), round(left * whole[1] / width)
    # PIL's filter within 1/255, several times faster, and PIL's would be faster only for a small part
    resized = interpolate(pixels(image)[None], whole, mode="bilinear", antialias=True)[0]  # (3, H', W')
    return resized[:, y : y + size[0], x : x + size[1]]


def pixels(image: Image.Image) -> Tensor:
    """A picture's pixels (3, H, W), channels last in memory."""
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """Any picture in 8-bit RGB: 16 bits scaled, what is transparent over white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
