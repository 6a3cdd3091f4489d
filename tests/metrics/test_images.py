"""PSNR and SSIM beside torchmetrics' and by hand, at any size."""

import math

import pytest
import torch

from ldm.metrics.images import gradient_energy, measures, psnr, ssim


def pictures(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(3, 3, *size, dtype=torch.float64) * 2 - 1
    return x, (x + torch.tensor([0.01, 0.1, 0.5]).view(3, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def test_autocast_changes_nothing():
    """A training in bfloat16 says of its pictures what `ldm evaluate` says."""
    x, y = (picture.float() for picture in pictures(20, 20))
    plain = measures(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = measures(x, y)
        assert not torch.equal(ssim(x, y), plain["ssim"])
    assert all(torch.equal(mixed[name], plain[name]) for name in plain)


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 5, 4)
    y = torch.stack((x[0] + 0.2, x[1] + 0.02))  # errors of a tenth and a hundredth of the range
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0]))
    assert psnr(x, x).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (11, 23)])
def test_they_equal_torchmetrics(size):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = pictures(*size)
    theirs = peak_signal_noise_ratio(y, x, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(x, y), theirs.double())
    _, theirs = structural_similarity_index_measure(y / 2 + 0.5, x / 2 + 0.5, data_range=1.0, return_full_image=True)
    inside = theirs[..., 5:-5, 5:-5].mean((1, 2, 3))  # they pad by reflection, Wang et al. do not
    torch.testing.assert_close(ssim(x, y), inside, rtol=1e-9, atol=0)


def test_small_pictures_have_an_ssim():
    x, y = pictures(4, 9)
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=torch.float64))
    first, second, third = ssim(x, y).tolist()
    assert 1 > first > second > third > -1


def test_ssim_of_flat_pictures_by_hand():
    """Without structure only eq. 6 is left: (2ab + C1) / (a^2 + b^2 + C1)."""
    x = torch.full((1, 1, 16, 16), -0.5, dtype=torch.float64)
    y = -x  # 1/4 and 3/4 in [0, 1]
    expected = (2 * 3 / 16 + 1e-4) / (1 / 16 + 9 / 16 + 1e-4)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_samples_are_measured_one_by_one_and_as_they_would_be_saved():
    x, y = pictures(24, 24)
    together, beyond = measures(x, y), measures(x.sign(), x.sign() * 3)
    for i in range(3):
        for name, value in measures(x[i : i + 1], y[i : i + 1]).items():
            torch.testing.assert_close(together[name][i : i + 1], value)
    assert beyond["psnr"].isinf().all()  # 3 is saved as 1
    assert list(measures(x, y, lambda a, b: (a - b).abs().mean((1, 2, 3)))) == ["psnr", "ssim", "lpips"]


def test_gradient_energy_by_hand():
    """A stripe of 0 and 1 across: every step to the right is 1, no step down; half of it is a quarter."""
    x = (torch.arange(8) % 2).float().expand(1, 1, 8, 8)
    assert gradient_energy(x).item() == 1
    assert gradient_energy(x.transpose(2, 3) / 2).item() == 0.25
