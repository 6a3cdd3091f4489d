"""Tiles against the whole picture: where they must agree, how far real networks differ, and that no seam shows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ldm
from ldm.models.tiling import sliced, tiled, tiled_decode, tiled_encode
from ldm.pictures import to_float, to_pil
from ldm.scenes import render, scene
from tests.models.first_stages import KL, VQ, fill, small


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (5, 4), (7, 3), (16, 8)])
@pytest.mark.parametrize(("height", "width"), [(3, 20), (13, 9), (7, 7)])
def test_what_looks_at_nothing_else_is_the_same_in_tiles(tile, overlap, height, width):
    x = torch.randn(2, 3, 4 * height, 4 * width)
    pooled = F.avg_pool2d(x, 4)
    torch.testing.assert_close(tiled(lambda part: F.avg_pool2d(part, 4), x, tile, overlap, unit=4, unit_out=1), pooled)
    whole = F.interpolate(pooled, scale_factor=4.0)
    torch.testing.assert_close(
        tiled(lambda part: F.interpolate(part, scale_factor=4.0), pooled, tile, overlap, unit=1, unit_out=4), whole
    )


def test_tiles_have_one_size_and_are_no_larger_than_asked():
    sizes = []
    tiled(lambda part: sizes.append(tuple(part.shape[2:])) or part, torch.zeros(1, 1, 21, 5), 8, 2, unit=1, unit_out=1)
    assert sizes == [(8, 5)] * 4


def test_tiles_of_different_brightness_meet_in_a_slope_and_not_in_a_step():
    """Whatever a tile's own GroupNorm does to its level is spread over the overlap."""
    levels = iter([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    picture = tiled(lambda part: part + next(levels), torch.zeros(1, 1, 40, 40), 16, 4, unit=1, unit_out=1)
    assert picture.max() == 1
    assert picture.min() == 0
    steps = max(picture.diff(dim=2).abs().max(), picture.diff(dim=3).abs().max())
    assert steps <= 1 / 4 + 1e-6


@pytest.mark.parametrize("options", [KL, VQ])
def test_one_tile_is_the_whole(options):
    ours = fill(small(**options))
    ours.set_statistics(0.1, 0.5)
    x = torch.randn(1, 3, 32, 24)
    z = ours.encode(x)
    torch.testing.assert_close(tiled_encode(ours, x, tile=8, overlap=2), z)
    torch.testing.assert_close(tiled_decode(ours, z, tile=8, overlap=2), ours.decode(z))


def test_slices_are_the_whole():
    ours = fill(small(**KL))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(sliced(ours.encode, x, size=2), ours.encode(x), rtol=1e-4, atol=1e-5)


BAD = [
    (
        lambda ours: tiled_decode(ours, torch.zeros(1, 4, 8, 8), tile=4, overlap=4),
        "overlap: must be less than a tile; got 4; expected 0 to 3; try 1",
    ),
    (lambda ours: tiled_decode(ours, torch.zeros(1, 4, 8, 8), tile=0), "tile: must be positive; got 0"),
    (
        lambda ours: tiled_encode(ours, torch.zeros(1, 3, 65, 64)),
        "x: size not divisible by the network's factor; got 65x64; expected multiples of 4; try 64x64",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message follows
        call(small())
    assert str(error.value) == message


def test_a_pipeline_s_pictures_in_tiles(monkeypatch):
    """The first stage sees one picture's tile at a time; a tile as large as the picture is the picture."""
    pipe, sides = ldm.load(device="cpu"), []
    for name, unit in {"encode": 4, "decode": 1}.items():
        whole = getattr(pipe.autoencoder, name)

        def watched(x, whole=whole, unit=unit):
            sides.append((len(x), x.shape[2] // unit, x.shape[3] // unit))
            return whole(x)

        monkeypatch.setattr(pipe.autoencoder, name, watched)
    (given,) = to_pil(to_float(render([scene(0, 3)], 64)["image"]))
    asked = {"n": 2, "image": given, "steps": 3}
    at_once, one, many = (pipe("a red cube", **asked, tile=tile) for tile in (None, 16, 10))
    assert sides == [(1, 16, 16), (2, 16, 16), *[(1, 16, 16)] * 3, *[(1, 10, 10)] * 2 * 2 * 3]  # 16x16 latents
    apart = [[np.abs(np.subtract(a, b, dtype=float)).mean() for a, b in zip(at_once, other)] for other in (one, many)]
    assert max(apart[0]) < 0.1 < 1 < min(apart[1])


def relative_rms(ours: torch.Tensor, whole: torch.Tensor) -> float:
    return ((ours - whole).square().mean() / whole.var()).sqrt().item()


def worst_seam(ours: torch.Tensor, whole: torch.Tensor) -> float:
    """The strongest column-wise jump that tiling adds, in units of the picture's own mean jump."""
    return ((ours - whole).diff(dim=3).abs().mean((0, 1, 2)).max() / whole.diff(dim=3).abs().mean()).item()


STATED = {  # (relative RMS, worst seam) of a hard cut at 10 latents, of tiles of 10 blended over 4, of 15 over 4
    "encode": [(0.78, 1.45), (0.62, 1.25), (0.39, 0.81)],
    "decode": [(0.86, 1.64), (0.74, 1.56), (0.55, 1.34)],
}


@pytest.mark.parametrize("kind", STATED)
def test_what_tiling_costs_and_what_blending_saves(kind):
    """Random weights on 20x20 latents are a hard case: the numbers are large, and the order is what they show."""
    torch.manual_seed(0)
    ours = fill(small())
    x = F.interpolate(torch.randn(1, 3, 6, 6), size=80, mode="bicubic")
    with torch.no_grad():
        z = ours.encode(x)
        run, start, whole = (tiled_encode, x, z) if kind == "encode" else (tiled_decode, z, ours.decode(z))
        results = [run(ours, start, tile, overlap) for tile, overlap in ((10, 0), (10, 4), (15, 4))]
    measured = [(relative_rms(result, whole), worst_seam(result, whole)) for result in results]
    for pair, stated in zip(measured, STATED[kind]):
        assert pair == pytest.approx(stated, rel=0.02)
    assert measured == sorted(measured, reverse=True)
