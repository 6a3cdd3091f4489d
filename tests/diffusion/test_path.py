"""Paths, predictions, weights and spacings: closed forms and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion import path, posterior, prediction, spacing, weights
from ldm.diffusion.path import Level
from ldm.diffusion.prediction import Prediction
from tests.diffusion.closed_form import PAIRS, PATHS, PREDICTIONS

times = st.floats(0.02, 0.98)
SHAPES = [(2, 3), (2, 5, 3), (2, 3, 4, 4), (2, 3, 2, 4, 4)]
SPACINGS = {
    "trailing": lambda n: spacing.Trailing(steps=n),
    "shifted": lambda n: spacing.Trailing(steps=n, shift=3.0),
    "linspace": lambda n: spacing.Linspace(steps=n),
    "leading": lambda n: spacing.Leading(steps=n),
    "log_snr": lambda n: spacing.LogSNR(steps=n),
    "karras": lambda n: spacing.Karras(steps=n),
}


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw_level(where: path.Path, *t: float) -> Level:
    return where.level(where.snap(float64(*t)))


@settings(max_examples=200, deadline=None)
@given(pair=st.sampled_from(PAIRS), t=times, other=times, shape=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_the_inversion_undoes_the_output(pair, t, other, shape, seed):
    where, kind = PATHS[pair[0]], PREDICTIONS[pair[1]]
    level = draw_level(where, t, other)
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = path.expand(level.alpha, x0) * x0 + path.expand(level.sigma, x0) * eps
    found = kind.recover(x, kind.raw(Prediction(x0, eps), level), level)
    tolerance = 1e-11 / level.alpha.min().item() / level.sigma.min().item() * max(1, level.sigma.max().item())
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=tolerance)


@settings(max_examples=100, deadline=None)
@given(pair=st.sampled_from(PAIRS), t=times, shape=st.sampled_from(SHAPES))
def test_one_row_for_the_batch_equals_a_level_per_sample(pair, t, shape):
    where, kind = PATHS[pair[0]], PREDICTIONS[pair[1]]
    level, x, y = draw_level(where, t, t), torch.randn(shape).double(), torch.randn(shape).double()
    for a, b in zip(kind.recover(x, y, level)[:2], kind.recover(x, y, level.rows()[0])[:2]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_of_the_published_table():
    """v, flow and EDM's F against their definitions."""
    level = path.VE(sigma_data=0.7).at(float64(-0.4, 1.3))
    x0, eps = float64(0.3, -1.1), float64(0.9, 0.2)
    s, d = level.sigma, 0.7
    x = x0 + s * eps
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    raw = prediction.EDM(sigma_data=d).raw(Prediction(x0[:, None], eps[:, None]), level)[:, 0]
    torch.testing.assert_close(raw, (x0 - c_skip * x) / c_out)
    torch.testing.assert_close(level.c_in, 1 / (s**2 + d**2).sqrt())
    torch.testing.assert_close(level.t, s.log() / 4)
    row = path.Flow().level(float64(0.3)).rows()[0]
    assert prediction.V().row(row) == (-0.3, 0.7)
    assert prediction.Flow().row(row) == (-1.0, 1.0)


@settings(max_examples=150, deadline=None)
@given(pair=st.sampled_from(PAIRS), t=times, gamma=st.floats(0.5, 20))
def test_min_snr_as_the_literature_has_it(pair, t, gamma):
    where, kind = pair
    level = draw_level(PATHS[where], t)
    snr = (level.alpha / level.sigma) ** 2
    expected = {
        "eps": snr.clamp(max=gamma) / snr,
        "v": snr.clamp(max=gamma) / (snr * (level.alpha**2 + level.sigma**2) ** 2 / level.alpha**2 * level.sigma**2),
        "x0": snr.clamp(max=gamma),
        "flow": snr.clamp(max=gamma) * level.sigma**2 / (level.alpha + level.sigma) ** 2,
        "edm": snr.clamp(max=gamma) * (0.5 * level.sigma) ** 2 / (level.sigma**2 + 0.25),  # times c_out^2
    }[kind]
    if kind == "v":  # (alpha^2 + sigma^2) is 1 on variance preserving paths: min(SNR, g) / (SNR + 1)
        expected = snr.clamp(max=gamma) * level.sigma**2 / (level.alpha**2 + level.sigma**2) ** 2
    torch.testing.assert_close(weights.MinSNR(gamma=gamma)(PREDICTIONS[kind], level), expected, rtol=1e-9, atol=0)


def test_min_snr_for_v_on_a_variance_preserving_path():
    level = PATHS["cosine"].level(float64(0.1, 0.5, 0.9))
    snr = (level.alpha / level.sigma) ** 2
    found = weights.MinSNR(gamma=5.0)(PREDICTIONS["v"], level)
    torch.testing.assert_close(found, snr.clamp(max=5) / (snr + 1))


@pytest.mark.parametrize(("where", "kind"), PAIRS)
def test_each_weight_is_a_weight_of_x0(where, kind):
    """weight(y) * |y - y_hat|^2 = weight(x0) * |x0 - x0_hat|^2, by really disturbing the output."""
    level = draw_level(PATHS[where], 0.3, 0.7)
    x, y, dy = (torch.randn(2, 4).double() for _ in range(3))
    target = PREDICTIONS[kind]
    dx0 = target.recover(x, y + dy, level).x0 - target.recover(x, y, level).x0
    snr, s, d = (level.alpha / level.sigma) ** 2, level.sigma, 0.5
    of_x0 = {
        weights.SNR(): snr,
        weights.MinSNR(gamma=2.0): snr.clamp(max=2.0),
        weights.EDM(sigma_data=d): (s**2 + d**2) / (s * d) ** 2,
    }
    for weight, expected in of_x0.items():
        left = weight(target, level)[:, None] * dy**2
        torch.testing.assert_close(left, expected[:, None] * dx0**2, rtol=1e-6, atol=1e-12)
    assert torch.equal(weights.Constant()(target, level), torch.ones(2).double())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_are_finite_at_both_ends(gamma):
    for t in (0.0, 1.0):
        level = path.Flow().level(float64(t))
        for kind in ("v", "flow"):
            assert weights.MinSNR(gamma=gamma)(PREDICTIONS[kind], level).isfinite().all()


def test_edm_weight_is_one_on_its_own_output():
    level = path.VE().at(float64(-3.0, 0.0, 2.0))
    found = weights.EDM(sigma_data=0.5)(PREDICTIONS["edm"], level)
    torch.testing.assert_close(found, torch.ones(3).double())


@settings(max_examples=300, deadline=None)
@given(
    where=st.sampled_from(list(PATHS)),
    rule=st.sampled_from(list(SPACINGS)),
    steps=st.integers(1, 40),
    end=st.sampled_from(["zero", "table"]),
)
def test_grids_fall_from_the_prior_to_their_end(where, rule, steps, end):
    chosen, on = SPACINGS[rule](steps), PATHS[where]
    chosen.end = end
    beyond = ends_beyond(chosen, on) if end == "table" else -1.0
    if (rule == "leading" and not isinstance(on, path.Table)) or beyond > 1e-9 or (steps == 1 and beyond > -1e-9):
        with pytest.raises(ValueError, match=r"steps|type"):
            chosen.grid(on)
        return
    grid = chosen.grid(on)
    assert [field.dtype for field in grid] == [torch.float64] * 4
    assert all(len(field) == steps + (beyond < -1e-9) for field in grid)
    assert (grid.log_snr.diff() > 0).all()
    assert (grid.t[:-1].diff() < 0).all()
    assert grid.t.isfinite().all()
    assert grid.c_in.isfinite().all()
    if rule != "leading":
        top = on.level(float64(1.0))
        assert (grid.alpha[0], grid.sigma[0]) == (top.alpha[0], top.sigma[0])
    if end == "zero":
        assert (grid.alpha[-1], grid.sigma[-1]) == (1.0, 0.0)
    else:
        assert grid.sigma[-1].item() == pytest.approx(on.level(float64(on.t_min)).sigma.item(), rel=1e-8)


def ends_beyond(chosen: spacing.Spacing, where: path.Path) -> float:
    """How far a rule's last level lies beyond the least noisy trained: 0 needs no further step, more has none."""
    if isinstance(chosen, spacing.Leading) and not isinstance(where, path.Table):
        return -1.0
    return (chosen.levels(where).log_snr[-1] - where.level(float64(where.t_min)).log_snr[0]).item()


def test_spacings_by_hand():
    sd = PATHS["scaled_linear"]
    assert spacing.Leading(steps=50).grid(sd).t.tolist() == [*range(981, 0, -20), 0]
    assert spacing.Trailing(steps=4).grid(sd).t.tolist() == [999, 749, 499, 249, 0]
    assert spacing.Linspace(steps=4).grid(sd).t.tolist() == [999, 666, 333, 0, 0]
    assert spacing.Trailing(steps=4).grid(PATHS["flow"]).sigma.tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = spacing.Trailing(steps=4, shift=3.0).grid(PATHS["flow"]).sigma
    torch.testing.assert_close(shifted, float64(1, 0.9, 0.75, 0.5, 0))
    assert spacing.Explicit(times=[900, 400, 10]).grid(sd).t.tolist() == [900, 400, 10, 0]
    rho, low, high = 7, 0.002, 80
    karras = [(high ** (1 / rho) + i / 4 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(5)]
    found = spacing.Karras(steps=5).grid(PATHS["ve"]).sigma
    torch.testing.assert_close(found, float64(*karras, 0))
    clocks = [math.log(sigma) / 4 for sigma in karras]  # as its network is told them, down to sigma_min
    torch.testing.assert_close(spacing.Explicit(times=clocks).grid(PATHS["ve"]).sigma, float64(*karras, 0))
    even = spacing.LogSNR(steps=6).grid(PATHS["vp_sde"]).log_snr[:-1].diff()
    torch.testing.assert_close(even, even[:1].expand(5))


def test_stable_diffusions_own_ddim_ends_at_its_table():
    grid = spacing.Leading(steps=50, end="table").grid(PATHS["scaled_linear"])
    assert grid.sigma[-1].item() == pytest.approx(math.sqrt(0.00085), rel=1e-9)
    assert grid.sigma[-1].item() == pytest.approx(0.029, abs=5e-4)


@pytest.mark.parametrize("where", PATHS)
def test_the_two_ways_to_a_level_agree(where):
    on = PATHS[where]
    level = on.level(torch.linspace(on.t_min, on.t_max, 20, dtype=torch.float64))
    again = on.at(level.log_snr)
    for a, b in zip(level, again):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(on.level(on.time(level.t)).sigma, level.sigma, rtol=1e-7, atol=1e-9)


def test_tables_against_their_definitions():
    """abar by the plain product in the published form of each table."""
    betas = [0.0001 + (0.02 - 0.0001) * k / 999 for k in range(1000)]
    assert_abar(PATHS["linear"], betas)
    assert_abar(
        PATHS["scaled_linear"], [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2 for k in range(1000)]
    )
    f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    assert_abar(PATHS["cosine"], [min(1 - f[k + 1] / f[k], 0.999) for k in range(1000)])


def assert_abar(where: path.Path, betas: list[float]):
    abar = 1.0
    for k, beta in enumerate(betas):
        abar *= 1 - beta
        if k in (0, 1, 10, 500, 998, 999):
            level = where.level(float64((k + 1) / len(betas)))
            assert level.alpha.item() ** 2 == pytest.approx(abar, rel=1e-9)
            assert level.sigma.item() ** 2 == pytest.approx(1 - abar, rel=1e-9)
            assert level.t.item() == k  # exact at the integers


def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_noise():
    plain, rescaled = PATHS["scaled_linear"], PATHS["zero_terminal_snr"]
    ends = float64(1 / 1000, 1.0)
    assert rescaled.level(ends).alpha[0].item() == pytest.approx(plain.level(ends).alpha[0].item(), rel=1e-12)
    assert (rescaled.level(ends).alpha[1], rescaled.level(ends).sigma[1]) == (0, 1)


def test_vp_sde_by_integration():
    """alpha = exp(-1/2 int beta), by a fine sum."""
    t = torch.linspace(0, 0.37, 100_001, dtype=torch.float64)
    beta = 0.1 + t * (20 - 0.1)
    level = PATHS["vp_sde"].level(t[-1:])
    assert level.alpha.item() == pytest.approx(math.exp(-0.5 * torch.trapezoid(beta, t).item()), rel=1e-9)
    assert level.alpha.item() ** 2 + level.sigma.item() ** 2 == pytest.approx(1, rel=1e-12)
    assert level.t.item() == pytest.approx(999 * 0.37)


def test_priors():
    z = torch.ones(2, 2)
    assert torch.equal(PATHS["ve"].prior(z), 80 * z)
    assert torch.equal(PATHS["flow"].prior(z), z)
    assert torch.equal(PATHS["scaled_linear"].prior(z), z)
    assert PATHS["flow"].prior(z.half()).dtype == torch.float32


@pytest.mark.parametrize("where", PATHS)
def test_posterior_by_bayes(where):
    """q(x_s | x_t, x0) from prior times likelihood, against the weights and variances in use."""
    now, next = spacing.LogSNR(steps=9).grid(PATHS[where]).rows()[5:7]
    ratio = now.alpha / next.alpha
    likelihood = now.sigma**2 - ratio**2 * next.sigma**2  # the variance of x_t given x_s
    precision = 1 / next.sigma**2 + ratio**2 / likelihood
    assert posterior.large_variance(now, next) == pytest.approx(likelihood, rel=1e-12)
    assert posterior.small_variance(now, next) == pytest.approx(1 / precision, rel=1e-9)
    a, b = posterior.mean_weights(now, next, posterior.small_variance(now, next))
    assert a == pytest.approx(ratio / likelihood / precision, rel=1e-9)
    assert b == pytest.approx(next.alpha / next.sigma**2 / precision, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: path.linear(steps=1), "steps: must be at least 2, got 1"),
        (lambda: path.linear(start=0.5, end=0.1), "start: must lie below end, both between 0 and 1, got 0.5 and 0.1"),
        (lambda: path.Table(betas=[0.1, 1.5]), "betas: must be at least two numbers between 0 and 1"),
        (lambda: path.VE(sigma_min=2.0, sigma_max=1.0), "sigma_min: must lie between 0 and sigma_max, got 2.0 and 1.0"),
        (lambda: path.VE(sigma_data=0.0), "sigma_data: must be above 0, got 0.0"),
        (lambda: path.Flow(last=0.0), "last: must lie between 0.001 and 1, got 0.0"),
        (lambda: spacing.Trailing(steps=0), "steps: must be at least 1, got 0"),
        (lambda: spacing.Trailing(steps=3, end="both"), "end: must be zero or table, got both"),
        (lambda: spacing.Trailing(steps=3, shift=-1.0), "shift: must be above 0, got -1.0"),
        (lambda: weights.MinSNR(gamma=0.0), "gamma: must be above 0, got 0.0"),
    ],
)
def test_impossible_numbers(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("where", ["zero_terminal_snr", "flow"])
def test_eps_is_refused_where_alpha_is_zero(where):
    with pytest.raises(ValueError, match="eps does not determine x0 where alpha = 0"):
        prediction.Eps().check(PATHS[where])
    for kind in ("v", "flow"):
        PREDICTIONS[kind].check(PATHS[where])
    prediction.Eps().check(path.Flow(last=0.999))
