"""The Frechet distance against closed forms of Gaussians, scipy's matrix root and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldm.metrics.feature_metrics import Moments, frechet_distance


def gaussian(mean: list[float], covariance: torch.Tensor) -> Moments:
    """Moments as if measured on so many samples that they are the true ones."""
    return Moments(1001, torch.tensor(mean, dtype=torch.float64), covariance.double() * 1000)


def features(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Correlated features far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 100 + seed


def test_diagonal_gaussians_have_a_closed_form():
    a = gaussian([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    b = gaussian([1.0, 1.0, 0.0], torch.diag(torch.tensor([4.0, 1.0, 9.0])))
    assert frechet_distance(a, b) == pytest.approx((1 + 4) + (1 - 2) ** 2 + (2 - 1) ** 2)  # sum of (s - s')^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_it_does_not_see_a_rotation():
    turn = torch.linalg.qr(features(6)).Q
    x, y = features(50), features(70, seed=1)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(Moments.of(x @ turn), Moments.of(y @ turn)) == pytest.approx(distance, rel=1e-9)


def test_the_root_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = Moments.of(features(40)), Moments.of(features(60, seed=1))
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace().real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("cuts", [[40], [1, 39], [13, 13, 14], [1] * 40])
def test_batches_and_ranks_join_to_the_same_moments(cuts):
    x = features(40)
    first, *rest = [Moments.of(part) for part in x.split(cuts)]
    joined = sum(rest, start=first)
    assert joined.count == 40
    torch.testing.assert_close(joined.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(joined.covariance, torch.cov(x.T), rtol=1e-11, atol=1e-11)


def test_float32_features_far_from_zero_keep_their_covariance():
    x = (features(100) + 1e4).float()
    parts = [Moments.of(part) for part in x.split(10)]
    torch.testing.assert_close(sum(parts[1:], start=parts[0]).covariance, torch.cov(x.double().T))


def test_few_samples_in_many_dimensions_are_finite():
    a, b = Moments.of(features(5, width=64)), Moments.of(features(5, width=64, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)


def test_torchmetrics_agrees():
    """Its FID with features that are a picture's own pixels."""
    image = pytest.importorskip("torchmetrics.image.fid")

    class Pixels(nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double()

    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (30, 3, 2, 2), generator=generator, dtype=torch.uint8) for top in (256, 200))
    fid = image.FrechetInceptionDistance(Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    for batch in (real[:20], real[20:]):
        fid.update(batch, real=True)
    fid.update(fake, real=False)
    ours = frechet_distance(
        Moments.of(real[:20].flatten(1)) + Moments.of(real[20:].flatten(1)), Moments.of(fake.flatten(1))
    )
    assert ours == pytest.approx(fid.compute().item(), rel=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, 4)])
def test_what_is_no_set_of_vectors_is_refused(x):
    with pytest.raises(ValueError, match=r"^features: not a set of vectors; got shape"):
        Moments.of(x)


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match=r"^features: too few for a covariance; got 1; expected 2"):
        frechet_distance(Moments.of(features(1)), Moments.of(features(9)))


def test_what_is_not_finite_is_at_no_distance_that_is():
    x = torch.randn(8, 3)
    assert math.isnan(frechet_distance(Moments.of(x), Moments.of(x.index_fill(0, torch.tensor(2), torch.nan))))
