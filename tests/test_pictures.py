"""Pictures of users: turned as they are looked at, and of any depth."""

import numpy as np
import torch
from PIL import Image

from ldm import pictures

TURNED = 6  # to be looked at with a quarter turn to the right


def turned(image: Image.Image) -> Image.Image:
    """A picture whose file says that it lies on its side."""
    image.getexif()[0x0112] = TURNED
    return image


def test_a_mask_and_classes_are_turned_as_their_picture_is():
    values = np.zeros((4, 6), np.uint8)
    values[0, 0] = 200  # after the turn, top right
    image = pictures.to_tensor(turned(Image.fromarray(values)))
    assert image.shape == (1, 3, 6, 4)
    assert (image[0, 0] > 0).nonzero().tolist() == [[0, 3]]
    assert pictures.to_mask(turned(Image.fromarray(values)), (6, 4))[0, 0].nonzero().tolist() == [[0, 3]]
    assert pictures.to_classes(turned(Image.fromarray(values)), (6, 4))[0].nonzero().tolist() == [[0, 3]]


def test_sixteen_bits_are_not_all_white():
    ramp = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(2, 0))
    assert pictures.to_mask(ramp, (2, 64)).mean() == 0.5
    expected = torch.linspace(-1, 1, 64).expand(1, 3, 2, 64)
    torch.testing.assert_close(pictures.to_tensor(ramp), expected, atol=0.008, rtol=0)
