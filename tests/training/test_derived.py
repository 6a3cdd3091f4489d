"""Masks and small pictures that are made from a training picture."""

import pytest
import torch

from ldm.conditioning.spatial import LowResolution, MaskedImage
from ldm.training.derived import derived, holes

IMAGE = torch.rand(64, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
BATCH = {"image": IMAGE, "number": torch.arange(64)}
ALL = ("image", "mask", "low_resolution", "noise_level", "low_resolution_noise")


def rows(batch: dict, *numbers: int) -> dict:
    return {name: x[list(numbers)] for name, x in batch.items()}


def test_a_sample_has_its_own_whatever_its_batch():
    whole, part = derived(BATCH, ALL, 3, 4), derived(rows(BATCH, 7, 2), ALL, 3, 4)
    assert whole.keys() == set(ALL) - {"image"}
    for name, x in part.items():
        assert torch.equal(x, whole[name][[7, 2]])
    other = derived(BATCH, ALL, 4, 4)
    assert all(not torch.equal(other[name], whole[name]) for name in whole.keys() - {"low_resolution"})


def test_what_the_data_bring_stays():
    given = BATCH | {"mask": torch.ones(64, 1, 16, 24), "low_resolution": torch.zeros(64, 3, 2, 3)}
    made = derived(given, ALL, 0, 4)
    assert made.keys() == {"noise_level", "low_resolution_noise"}
    assert made["low_resolution_noise"].shape == (64, 3, 2, 3)
    assert derived(BATCH, ("image", "caption"), 0, 4) == {}


def test_a_small_picture_is_made_of_means():
    small = derived(BATCH, ALL, 0, 4)["low_resolution"]
    assert small.shape == (64, 3, 4, 6)
    torch.testing.assert_close(small[5, 1, 2, 3], IMAGE[5, 1, 8:12, 12:16].mean())


def test_levels_of_noise_are_spread_over_a_third_of_the_thousand():
    numbers = torch.arange(4000)
    image = torch.zeros(4000, 3, 1, 1)
    made = derived({"image": image, "number": numbers}, ALL, 0, 1)
    levels, noise = made["noise_level"], made["low_resolution_noise"]
    assert (levels.min(), levels.max()) == (0, 349)
    assert levels.float().mean() == pytest.approx(174.5, abs=6)  # four standard errors
    assert noise.std() == pytest.approx(1, abs=0.03)


def test_masks_are_unions_of_rectangles():
    """The first alone where the first number is small; each as the numbers say, counted pixel by pixel."""
    g = torch.Generator().manual_seed(1)
    u = torch.rand(50, 17, generator=g, dtype=torch.float64)
    masks = holes(u, (16, 24))
    for mask, (some, *numbers) in zip(masks, u.tolist()):
        expected = torch.zeros(16, 24)
        for k in range(1 + int(4 * some)):
            tall, wide, top, left = numbers[4 * k : 4 * k + 4]
            tall, wide = 0.125 + 0.375 * tall, 0.125 + 0.375 * wide
            top, left = top * (1 - tall), left * (1 - wide)
            for i in range(16):
                for j in range(24):
                    y, x = (i + 0.5) / 16, (j + 0.5) / 24
                    expected[i, j] += top <= y < top + tall and left <= x < left + wide
        assert torch.equal(mask[0], expected.clamp(max=1))
    assert 0.1 < masks.mean() < 0.4


def test_conditioners_read_it():
    batch = BATCH | derived(BATCH, ALL, 0, 4)
    assert LowResolution()(batch).concat.shape == (64, 3, 4, 6)
    masked = MaskedImage(encode=lambda x: x[:, :, ::4, ::4], latent_channels=3)
    assert masked(batch).concat.shape == (64, 4, 4, 6)
