"""The kernel distance, precision, recall, density, coverage and the Inception score, against second implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from ldm.metrics.feature_metrics import inception_score, kernel_distance, nearest, prdc, squared_mmd


def features(count: int, width: int = 5, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Normal ones."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_squared_mmd_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    x, y = features(40), features(40, seed=1, shift=0.3)
    a, b = x.double().numpy(), y.double().numpy()
    settings = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0}
    theirs = mmd2(*(kernel_poly(p, q, **settings) for p, q in ((a, a), (a, b), (b, b))))
    assert squared_mmd(x.double(), y.double()) == pytest.approx(theirs, rel=1e-9)


def test_the_kernel_distance_has_no_bias_and_sees_a_shift():
    """The mean over many pairs of small equal sets is zero within its error; a plain V-statistic's is far from it."""
    found = [squared_mmd(features(8, seed=2 * i).double(), features(8, seed=2 * i + 1).double()) for i in range(400)]
    mean, error = np.mean(found), np.std(found) / 20
    assert abs(mean) < 3 * error
    assert kernel_distance(features(200), features(200, seed=1, shift=1.0))["mean"] > 50 * error
    assert kernel_distance(features(50), features(60)) == kernel_distance(features(50), features(60))


def reference(true: np.ndarray, made: np.ndarray, k: int) -> tuple[float, ...]:
    """The definitions, sample by sample."""
    own_true, own_made, apart = cdist(true, true), cdist(made, made), cdist(true, made)
    reach_true, reach_made = np.sort(own_true, 1)[:, k], np.sort(own_made, 1)[:, k]
    inside = apart < reach_true[:, None]  # [true, made]
    precision = inside.any(0).mean()
    recall = (apart < reach_made[None]).any(1).mean()
    density = inside.sum(0).mean() / k
    return precision, recall, density, inside.any(1).mean()


@pytest.mark.parametrize(("shift", "made"), [(0.0, 90), (1.0, 60), (9.0, 60)])
def test_precision_recall_density_and_coverage_are_their_definitions(shift, made):
    true, other = features(80), features(made, seed=1, shift=shift)
    assert tuple(prdc(true, other, 3).values()) == pytest.approx(reference(true.numpy(), other.numpy(), 3), abs=1e-12)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    true, made = features(80), features(60, seed=1, shift=0.5)
    theirs = calculate_precision_recall_full(made, true, neighborhood=3)
    assert tuple(prdc(true, made, 3).values())[:2] == pytest.approx(theirs, abs=1e-6)
    assert 0.2 < theirs[0] < 0.99  # not the end of the scale


def test_the_inception_score_is_torch_fidelitys_and_has_two_ends():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features(103, 12) * 3
    theirs = isc_features_to_metric(logits, 1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, 1)["mean"] == pytest.approx(theirs, rel=1e-9)
    assert inception_score(torch.zeros(20, 12))["mean"] == pytest.approx(1)
    assert inception_score(torch.eye(12).repeat(10, 1) * 1000, 1)["mean"] == pytest.approx(12)


def test_classes_that_come_one_by_one_are_mixed_first():
    logits = torch.eye(100).repeat_interleave(10, 0) * 1000
    assert inception_score(logits)["mean"] > 50  # each tenth of them alone has ten classes


def test_the_nearest_is_found():
    x, y = features(7), features(50, seed=1)
    apart, where = nearest(x, y)
    assert np.array_equal(where.numpy(), cdist(x, y).argmin(1))
    assert apart.numpy() == pytest.approx(cdist(x, y).min(1), rel=1e-6)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda: prdc(features(3), features(9), 3), "features: too few for 3 neighbours; got 3; expected 4 or more"),
        (
            lambda: kernel_distance(features(1), features(9)),
            "features: too few for a kernel distance; got 1; expected 4",
        ),
        (lambda: inception_score(features(3)), "logits: too few for 10 parts; got 3"),
    ],
)
def test_too_few_are_refused(measure, words):
    with pytest.raises(ValueError, match=words):
        measure()
