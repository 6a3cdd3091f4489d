"""Decoding against PIL and torchvision taking the long way round."""

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, JpegImagePlugin
from torchvision import transforms

from ldm import pictures
from ldm.data import decode
from tests.data import awkward
from tests.data.photographs import encoded, photograph


def long_way(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """All pixels, upright, resized to cover the size, then cropped at the centre: (H, W, 3)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    resized = decode.cover(image.size[::-1], size)
    image = transforms.Resize(resized, interpolation=transforms.InterpolationMode.BILINEAR)(image)
    return np.asarray(transforms.CenterCrop(size)(image)).astype(int)


def short_way(data: bytes, size: tuple[int, int], **options) -> np.ndarray:
    return decode.picture(data, size, **options).pixels.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("shape", [(480, 640), (1024, 1024), (700, 531), (1200, 300), (256, 256), (90, 130)])
@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_a_jpeg_differs_little_from_the_long_way(shape, noise):
    data = encoded(photograph(*shape, noise=noise))
    for size in ((256, 256), (128, 192)):
        assert np.abs(short_way(data, size) - long_way(data, size)).mean() < 2


@pytest.mark.parametrize("shape", [(480, 640), (301, 203), (256, 700), (60, 50), (256, 256)])
def test_a_png_differs_by_rounding(shape):
    data = encoded(photograph(*shape), "PNG")
    assert np.abs(short_way(data, (256, 256)) - long_way(data, (256, 256))).max() <= 2


def test_a_picture_of_the_right_size_is_untouched():
    image = photograph(64, 96)
    found = decode.picture(encoded(image, "PNG"), (64, 96))
    assert torch.equal(found.pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert found.original_size == (64, 96)
    assert found.crop == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_upright(orientation, form):
    """Also where only a part is wanted, at its side or not, and where a JPEG is decoded at a smaller scale."""
    image = photograph(300, 500, noise=2.0)
    stored = image.transpose(awkward.STORED[orientation]) if orientation > 1 else image
    data = encoded(stored, form, exif=awkward.exif(orientation), **{"lossless": True} if form == "WEBP" else {})
    for size in ((64, 64), (40, 100), (200, 120)):
        assert decode.picture(data, size).original_size == (300, 500)
        assert np.abs(short_way(data, size) - long_way(data, size)).mean() < 1.5
        height, width = decode.cover((300, 500), size)
        top, left = height - size[0], (width - size[1]) // 5
        expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        found = short_way(data, size, corner=(0.999, 0.2))
        assert np.abs(found - expected[top : top + size[0], left : left + size[1]]).mean() < 2
    assert decode.check(data) == (300, 500)


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.25), (1 - 2**-53, 1 - 2**-53)])
@pytest.mark.parametrize("shape", [(200, 330), (330, 200)])
def test_a_crop_lies_where_it_says(place, shape):
    image, size = photograph(*shape), (128, 128)
    resized = decode.cover(shape, size)
    whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR)).astype(int)
    for flip in (False, True):
        found = decode.picture(encoded(image, "PNG"), size, corner=place, flip=flip)
        top, left = found.crop
        assert (top, left) == tuple(int(u * (n - 128 + 1)) for u, n in zip(place, resized))
        expected = (whole[:, ::-1] if flip else whole)[top : top + 128, left : left + 128]
        assert np.abs(found.pixels.permute(1, 2, 0).numpy() - expected).max() <= 2


def test_only_what_is_needed_is_decoded(monkeypatch):
    """A JPEG is drafted when it shrinks, never below one and a half times what is wanted."""
    scales = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(image, mode, size):
        before = image.width
        result = draft(image, mode, size)
        scales.append(before / image.width)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    for side in (100, 256, 384, 768, 1600):
        decode.picture(encoded(photograph(side, side)), (128, 128))
    assert scales == [1, 1, 2, 4, 8]


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.tuples(st.integers(1, 600), st.integers(1, 600)))
def test_cover_covers_with_as_little_as_it_can(original, size):
    resized = decode.cover(original, size)
    assert all(r >= s for r, s in zip(resized, size))
    assert resized[0] == size[0] or resized[1] == size[1]
    scale = max(s / o for s, o in zip(size, original))
    assert all(abs(r - o * scale) <= 1 for r, o in zip(resized, original))


def test_the_limit_is_our_own(monkeypatch):
    data = encoded(photograph(100, 100), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode.check(data) == (100, 100)
        with pytest.raises(decode.BadPicture, match=r"^too many pixels: 100x100, the limit is 9,999$"):
            decode.check(data, limit=9999)
        with pytest.raises(decode.BadPicture, match="too many pixels"):
            decode.picture(data, (8, 8), limit=9999)


def test_a_bomb_costs_no_memory():
    """What would take 12 GB is refused by its header."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for form in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(decode.BadPicture, match=r"^too many pixels"):
            decode.check(awkward.claiming(16_000, 16_000, form))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_sixteen_bits_are_scaled_not_cut():
    """Each value of a 16-bit picture, in 8 bits."""
    values = np.arange(0, 65536, 256, dtype=">u2").reshape(16, 16)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    found = decode.picture(awkward.png(16, 16, 16, 0, rows), (16, 16)).pixels
    assert torch.equal(found[0].flatten(), torch.arange(256, dtype=torch.uint8))


def test_transparency_is_over_white():
    """A ramp of alpha over black is a ramp of gray."""
    image = Image.new("RGBA", (256, 4), "black")
    image.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, 0)))
    found = decode.picture(encoded(image, "PNG"), (4, 256)).pixels.int()
    assert (found - (255 - torch.arange(256))).abs().max() <= 1


def test_floats_begin_and_end_at_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(pictures.to_float(pixels), torch.tensor([-1.0, -0.6, 1.0]))
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(torch.from_numpy(np.array(pictures.to_pil(pictures.to_float(every))[0]))[..., 0], every[0, 0])
