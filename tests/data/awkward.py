"""Files that go wrong in all the ways that collections of pictures do, each with what should become of it."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

from tests.data.photographs import encoded

SIZE = (32, 48)  # (H, W) of the upright picture
QUADRANTS = {(0, 0): (250, 30, 20), (0, 1): (20, 160, 40), (1, 0): (30, 40, 220), (1, 1): (240, 240, 240)}
STORED = {  # how a camera that was held so stores the upright picture, by EXIF's number
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
GRAY, WHITE = "gray", "white"  # what else a used picture may show: its colours as gray, or over white


def upright(height: int = SIZE[0], width: int = SIZE[1]) -> Image.Image:
    """Four quadrants of different colours."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for (row, column), colour in QUADRANTS.items():
        rows, columns = slice(row * height // 2, (row + 1) * height // 2), slice(column * width // 2, None)
        pixels[rows, columns] = colour
    return Image.fromarray(pixels)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def turned(orientation: int, form: str = "JPEG", **options) -> bytes:
    image = upright()
    image = image.transpose(STORED[orientation]) if orientation in STORED else image
    return encoded(image, form, exif=exif(orientation), **options)


def transparent(mode: str) -> bytes:
    """The right half is transparent, over colours that should not be seen."""
    image = upright().convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (SIZE[1] // 2, 0, *image.size))
    image.putalpha(alpha)
    return encoded(image if mode == "RGBA" else image.convert(mode), "PNG")


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand; PIL does not write 16 bits in colour."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    pieces = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def deep(channels: str) -> bytes:
    """16 bits a channel, with noise in the lower byte that scaling should not see."""
    values = np.asarray(upright().convert(channels)).reshape(*SIZE, -1)
    values = values.astype(np.uint16) * 256 + np.random.default_rng(0).integers(0, 255, values.shape).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(SIZE[1], SIZE[0], 16, {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}[channels], rows)


def animation(form: str) -> bytes:
    return encoded(upright(), form, save_all=True, append_images=[Image.new("RGB", SIZE[::-1], "black")] * 3)


def palette(transparency: int | bytes | None = None) -> bytes:
    image = upright().quantize(16)
    if transparency is None:
        return encoded(image, "PNG")
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8).repeat(16, 0).repeat(24, 1)).convert("P")
    image.putpalette([*QUADRANTS[0, 0], 0, 0, 0, *QUADRANTS[1, 0]])
    return encoded(image, "PNG", transparency=transparency)


def claiming(width: int, height: int, form: str) -> bytes:
    """A small file whose header claims a large picture."""
    if form == "PNG":
        return png(width, height, 8, 2, b"\0" * 100)
    if form == "WEBP":
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
        frame = encoded(upright(), "WEBP")[12:]
        body += b"ANMF" + struct.pack("<I", 16 + len(frame)) + b"\0" * 6 + b"\x2f\0\0\x1f\0\0" + b"\0" * 4 + frame
        return b"RIFF" + struct.pack("<I", len(body)) + body
    if form == "GIF":
        return b"GIF89a" + struct.pack("<HH", width, height) + encoded(upright(), "GIF")[10:]
    data = bytearray(encoded(upright()))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def wrong_checksum(chunk: bytes, data: bytes) -> bytes:
    at = data.index(chunk)
    length = struct.unpack(">I", data[at - 4 : at])[0]
    crc = at + 4 + length
    return data[:crc] + bytes([data[crc] ^ 1]) + data[crc + 1 :]


def commented(text: str, compressed: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", text, zip=compressed)
    return encoded(upright(), "PNG", pnginfo=info)


def with_exif(payload: bytes) -> bytes:
    """A JPEG whose EXIF segment holds these bytes."""
    data, segment = encoded(upright()), b"Exif\0\0" + payload
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def detailed(form: str = "JPEG", **options) -> bytes:
    """Enough data for a truncation to matter."""
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    return encoded(Image.fromarray(noise), form, **options)


def tiff_exif(kind: int, count: int, value: bytes) -> bytes:
    """EXIF with an orientation of any type."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, kind, count) + value + b"\0" * 4


# name -> (the bytes, why it is skipped, or None where it is used and shows its colours, or GRAY or WHITE on the right)
PICTURES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "plain.jpg": (lambda: encoded(upright()), None),
    "UPPER.JPG": (lambda: encoded(upright()), None),
    "progressive.jpg": (lambda: encoded(upright(), progressive=True), None),
    "gray.jpg": (lambda: encoded(upright().convert("L")), GRAY),
    "cmyk.jpg": (lambda: encoded(upright().convert("CMYK")), None),
    "really_jpeg.png": (lambda: encoded(upright()), None),
    "full_chroma.jpg": (lambda: encoded(upright(), subsampling=0), None),
    "stereo.jpg": (lambda: encoded(upright(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]), None),
    "no_end_marker.jpg": (lambda: encoded(upright())[:-2], "damaged: image file is truncated"),
    "trailing.jpg": (lambda: encoded(upright()) + b"<html>" * 99, None),
    "bad_exif.jpg": (lambda: with_exif(b"II*\0\xff\xff\xff\x7f" + b"\xee" * 40), None),
    "short_exif.jpg": (lambda: with_exif(b"II"), None),
    "nonsense_exif.jpg": (lambda: with_exif(bytes(range(200))), None),
    "orientation_0.jpg": (lambda: turned(0), None),
    "orientation_9.jpg": (lambda: turned(9), None),
    "orientation_text.jpg": (lambda: with_exif(tiff_exif(2, 4, b"six\0")), None),
    "orientation_many.jpg": (lambda: with_exif(tiff_exif(3, 2, b"\x01\0\x06\0")), None),
    "truncated.jpg": (lambda: half(detailed()), "damaged: image file is truncated"),
    "truncated_progressive.jpg": (lambda: half(detailed(progressive=True)), "damaged: image file is truncated"),
    "truncated_header.jpg": (lambda: encoded(upright())[:100], "damaged"),
    "only_magic.jpg": (lambda: b"\xff\xd8\xff", "damaged"),
    "magic_and_noise.jpg": (lambda: b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(999), "damaged"),
    "empty.jpg": (lambda: b"", "an empty file"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "not a JPEG, PNG, WebP or GIF"),
    "pointer.jpg": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    "no_height.jpg": (lambda: claiming(48, 0, "JPEG"), "damaged"),
    "bomb.jpg": (lambda: claiming(65500, 65500, "JPEG"), "too many pixels: 65500x65500"),
    "zeros.jpg": (lambda: bytes(5000), "not a JPEG, PNG, WebP or GIF"),
    "rgb.png": (lambda: encoded(upright(), "PNG"), None),
    "gray.png": (lambda: encoded(upright().convert("L"), "PNG"), GRAY),
    "one_bit.png": (lambda: encoded(Image.fromarray(np.eye(32, dtype=bool)), "PNG"), "any"),
    "palette.png": (palette, None),
    "palette_index.png": (lambda: palette(1), WHITE),
    "palette_alpha.png": (lambda: palette(b"\xff\x00\xff"), WHITE),
    "rgba.png": (lambda: transparent("RGBA"), WHITE),
    "la.png": (lambda: transparent("LA"), "gray and white"),
    "rgb_key.png": (lambda: encoded(upright(), "PNG", transparency=(20, 160, 40)), "green is white"),
    "deep_gray.png": (lambda: deep("L"), GRAY),
    "deep_rgb.png": (lambda: deep("RGB"), None),
    "deep_rgba.png": (lambda: deep("RGBA"), None),
    "deep_la.png": (lambda: deep("LA"), GRAY),
    "turned.png": (lambda: turned(6, "PNG"), None),
    "animated.png": (lambda: animation("PNG"), None),
    "bomb.png": (lambda: claiming(50_000, 50_000, "PNG"), "too many pixels: 50000x50000"),
    "text_bomb.png": (lambda: commented("A" * 80_000_000, True), "damaged"),
    "comment.png": (lambda: commented("hello", False), None),
    "truncated.png": (lambda: half(detailed("PNG")), "damaged"),
    "no_data.png": (lambda: encoded(upright(), "PNG")[:40], "damaged"),
    "header_crc.png": (lambda: wrong_checksum(b"IHDR", encoded(upright(), "PNG")), "damaged: broken PNG file"),
    "data_crc.png": (lambda: wrong_checksum(b"IDAT", encoded(upright(), "PNG")), "damaged: broken PNG file"),
    "no_width.png": (lambda: png(0, 9, 8, 2, b""), "damaged"),
    "short_rows.png": (lambda: png(48, 32, 8, 2, b"\0" * 500), "damaged"),
    "lossy.webp": (lambda: encoded(upright(), "WEBP", quality=95), None),
    "lossless.webp": (lambda: encoded(upright(), "WEBP", lossless=True), None),
    "alpha.webp": (lambda: encoded(Image.open(io.BytesIO(transparent("RGBA"))), "WEBP", lossless=True), WHITE),
    "animated.webp": (lambda: animation("WEBP"), None),
    "turned.webp": (lambda: turned(6, "WEBP"), None),
    "truncated.webp": (lambda: half(detailed("WEBP", lossless=True)), "damaged"),
    "bomb.webp": (lambda: claiming(16_000, 16_000, "WEBP"), "too many pixels: 16000x16000"),
    "only_magic.webp": (lambda: b"RIFF\0\0\0\0WEBP", "damaged"),
    "palette.gif": (lambda: encoded(upright(), "GIF"), None),
    "animated.gif": (lambda: animation("GIF"), None),
    "transparent.gif": (lambda: encoded(Image.open(io.BytesIO(palette(1))), "GIF", transparency=1), WHITE),
    "really_gif.jpg": (lambda: encoded(upright(), "GIF"), None),
    "truncated.gif": (lambda: half(detailed("GIF")), "damaged: image file is truncated"),
    "only_magic.gif": (lambda: b"GIF89a", "damaged"),
    "bomb.gif": (lambda: claiming(65_500, 65_500, "GIF"), "too many pixels: 65500x65500"),
    "scan.tiff": (lambda: encoded(upright(), "TIFF"), "not a JPEG, PNG, WebP or GIF"),
    "old.bmp": (lambda: encoded(upright(), "BMP"), "not a JPEG, PNG, WebP or GIF"),
    "really_bmp.webp": (lambda: encoded(upright(), "BMP"), "not a JPEG, PNG, WebP or GIF"),
    "drawing.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a JPEG, PNG, WebP or GIF"),
    "packed.jpg": (lambda: gzip.compress(encoded(upright())), "not a JPEG, PNG, WebP or GIF"),
    **{f"orientation_{n}.jpg": (lambda n=n: turned(n), None) for n in range(1, 9)},
}

# name of a caption file -> (its bytes, the captions or the reason why the picture is skipped)
CAPTIONS: dict[str, tuple[bytes, list[str] | str]] = {
    "nothing.txt": (b"", "an empty caption"),
    "blank.txt": (b" \n\t ", "an empty caption"),
    "nul.txt": (b"a\0 cat\0", ["a cat"]),
    "only_nul.txt": (b"\0\0", "an empty caption"),
    "million.txt": (b"word " * 200_000 + b"end", ["word " * 200_000 + "end"]),
    "latin.txt": ("ein Mädchen".encode("latin-1"), "a caption that is not UTF-8"),
    "utf16.txt": ("a cat".encode("utf-16"), "a caption that is not UTF-8"),
    "mark.txt": (b"\xef\xbb\xbfa cat", ["a cat"]),
    "unicode.txt": ("猫 🐈‍⬛ żółw".encode(), ["猫 🐈‍⬛ żółw"]),
    "lines.txt": (b"one\ntwo\n", ["one\ntwo"]),
    "one.json": (b'{"caption": "a cat", "width": 3}', ["a cat"]),
    "several.json": (b'{"captions": ["a cat", "", "an animal"]}', ["a cat", "an animal"]),
    "text.json": (b'{"text": "a cat"}', ["a cat"]),
    "none.json": (b'{"width": 3}', "no caption"),
    "null.json": (b'{"caption": null}', "no caption"),
    "number.json": (b'{"caption": 3}', "a caption that is not a text"),
    "list.json": (b'["a cat"]', "a caption file that is not a JSON object"),
    "broken.json": (b'{"caption": "a c', "a caption file that is not JSON"),
    "deep.json": (b"[" * 200_000, "a caption file that is not JSON"),
    "surrogate.json": (b'{"caption": "a \\ud800 cat"}', "a caption that is not UTF-8"),
    "latin_object.json": ('{"caption": "Mädchen"}'.encode("latin-1"), "a caption that is not UTF-8"),
}
