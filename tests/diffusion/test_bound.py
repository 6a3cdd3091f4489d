"""The variational bound and the learned variance."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ldm.diffusion import bound, path, prediction
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.posterior import large_variance, small_variance
from tests.diffusion.closed_form import Exact, gaussian

ENTROPY = 0.5 * math.log2(2 * math.pi * math.e)  # of N(0, 1), in bits


class ExactDenoiser(Exact):
    """The exact denoiser with what the bound asks of one."""

    def __init__(self, variance: float, where: path.Path):
        super().__init__(gaussian(variance))
        self.path = where


def expected_bound(variance: float, where: path.Table, noise_var: str) -> float:
    """The bound's expectation: it is quadratic in data and noise, so two-point quadrature is exact."""
    std = variance**0.5
    x0 = torch.tensor([[std], [std], [-std], [-std]], dtype=torch.float64)
    noise = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    found = bound.bits_per_dim(ExactDenoiser(variance, where), x0, lambda: noise, noise_var=noise_var, bins=None)
    return found.total.mean().item()


def continuous(steps: int) -> path.Table:
    """The VP-SDE's betas from 0.1 to 20, cut into steps."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    return path.Table(betas=(1 - torch.exp(-integral.diff())).tolist())


def first_step(variance: float, where: path.Table) -> float:
    """What the last step to the data loses in bits by the published variance, step 2's posterior's, for its beta."""
    betas = 1 - (where.alpha[1:3] / where.alpha[:2]) ** 2
    beta, stands = betas[0].item(), (betas[1] * betas[0] / (1 - where.alpha[2] ** 2)).item()
    evenly_spaced = variance * beta / (variance * (1 - beta) + beta)  # of x0 given x_1
    return 0.5 * (math.log(stands / beta) + evenly_spaced / stands - evenly_spaced / beta) / math.log(2)


@pytest.mark.parametrize("where", [path.linear(), path.cosine(steps=50), path.scaled_linear(steps=20)])
def test_the_bound_is_the_entropy_of_a_standard_normal(where):
    """There the reverse process is exactly normal with variance beta_t, so nothing is lost before the last step."""
    assert abs(expected_bound(1.0, where, "large") - first_step(1.0, where) - ENTROPY) < 1e-6
    assert expected_bound(1.0, where, "small") > ENTROPY + 1e-4


def test_the_gap_halves_with_each_doubling_of_the_steps():
    entropy = ENTROPY + 0.5 * math.log2(0.25)
    paths = [continuous(steps) for steps in (250, 500, 1000)]
    gaps = [expected_bound(0.25, each, "large") - first_step(0.25, each) - entropy for each in paths]
    assert gaps[-1] > 0
    for wide, narrow in pairwise(gaps):
        assert abs(wide / narrow - 2) < 0.1


def test_the_parts_add_up():
    where = path.linear(start=1e-3, end=0.2, steps=30)
    x0 = torch.randn(4, 1, dtype=torch.float64).clamp(-1, 1)
    found = bound.bits_per_dim(ExactDenoiser(0.25, where), x0, lambda: torch.randn(4, 1, dtype=torch.float64))
    assert found.steps.shape == (30, 4)
    torch.testing.assert_close(found.total, found.prior + found.steps.sum(0))
    alpha, sigma = where.alpha[-1], where.sigma[-1]
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(alpha * x0, sigma), torch.distributions.Normal(0, 1)
    )
    torch.testing.assert_close(found.prior, kl.mean(1) / math.log(2))


def test_gaussian_kl_against_torch():
    distance, a, b = torch.randn(3, 50, dtype=torch.float64)
    p, q = torch.distributions.Normal(distance, (a / 2).exp()), torch.distributions.Normal(0, (b / 2).exp())
    torch.testing.assert_close(bound.gaussian_kl(distance, a, b), torch.distributions.kl_divergence(p, q))


def test_the_decoder_is_a_distribution_over_its_cells():
    """The probabilities of the 256 values add up to one, and each is the normal mass of its cell."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in [(0.1, 0.02), (-0.97, 0.1), (1.0, 1e-3), (0.3, 3.0)]:
        nll = bound.decoder_nll(
            values, torch.tensor(mean, dtype=torch.float64), torch.full_like(values, 2 * math.log(std)), 256
        )
        assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-9)
    normal = torch.distributions.Normal(*torch.tensor([0.1, 0.02], dtype=torch.float64))
    for i in (120, 140, 150):
        mass = normal.cdf(values[i] + 1 / 255) - normal.cdf(values[i] - 1 / 255)
        found = bound.decoder_nll(
            values[i],
            torch.tensor(0.1, dtype=torch.float64),
            torch.tensor(2 * math.log(0.02), dtype=torch.float64),
            256,
        )
        assert found.neg().exp().item() == pytest.approx(mass.item(), rel=1e-9)


def test_the_decoder_stays_finite_far_from_its_mean():
    log_var = torch.full((2,), -18.0, dtype=torch.float64)
    nll = bound.decoder_nll(torch.tensor([-1.0, 1.0]).double(), torch.tensor([1.0, -1.0]).double(), log_var, 256)
    assert nll.isfinite().all()
    assert (nll > 1e6).all()


def test_the_bound_wants_a_table():
    with pytest.raises(ValueError, match="path: the bound needs a table of betas"):
        bound.bits_per_dim(ExactDenoiser(1.0, path.Flow()), torch.zeros(1, 1), lambda: torch.zeros(1, 1))


class TwoChannels(nn.Module):
    """A backbone of one parameter per output half."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance = (nn.Parameter(torch.tensor(v).double()) for v in (0.3, 0.4))

    def forward(self, x, t):
        return torch.cat([self.mean * x, torch.tanh(self.variance * x)], 1)


LEARNED = prediction.LearnedRange(of=prediction.Eps(), bound_weight=1e-3)


def hybrid_by_hand(k: int, x0, noise, where: path.Table, model: TwoChannels) -> torch.Tensor:
    """Improved DDPM's L_simple + 0.001 T L_t, from betas, for one step k > 0."""
    abar = where.alpha[1:] ** 2
    beta = 1 - abar[k] / abar[k - 1]
    tilde = beta * (1 - abar[k - 1]) / (1 - abar[k])
    x = abar[k].sqrt() * x0 + (1 - abar[k]).sqrt() * noise
    eps, frac = model.mean * x, (torch.tanh(model.variance * x) + 1) / 2

    def mean(start):
        return (
            abar[k - 1].sqrt() * beta / (1 - abar[k]) * start
            + (abar[k] / abar[k - 1]).sqrt() * (1 - abar[k - 1]) / (1 - abar[k]) * x
        )

    guess = (x - (1 - abar[k]).sqrt() * eps.detach()) / abar[k].sqrt()
    model_std = torch.exp(0.5 * (frac * beta.log() + (1 - frac) * tilde.log()))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean(x0), tilde.sqrt()), torch.distributions.Normal(mean(guess), model_std)
    )
    return ((noise - eps) ** 2).mean(1) + 1e-3 * where.steps * kl.mean(1) / math.log(2)


@pytest.mark.parametrize("k", [1, 7, 49])
def test_hybrid_loss_by_hand(k):
    where, model = path.cosine(steps=50), TwoChannels()
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    level = where.level(torch.full((3,), (k + 1) / 50, dtype=torch.float64))
    found = Denoiser(model, where, LEARNED).loss(x0, level, noise)
    expected = hybrid_by_hand(k, x0, noise, where, model)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), model.parameters()) for loss in (found, expected))):
        torch.testing.assert_close(a, b)


def test_the_bound_trains_the_variance_alone():
    where, model = path.cosine(steps=50), TwoChannels()
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    level = where.level(torch.tensor([1, 20, 50], dtype=torch.float64) / 50)
    both = torch.autograd.grad(Denoiser(model, where, LEARNED).loss(x0, level, noise).sum(), model.parameters())
    simple = (noise - model.mean * (path.expand(level.alpha, x0) * x0 + path.expand(level.sigma, x0) * noise)) ** 2
    torch.testing.assert_close(both[0], torch.autograd.grad(simple.mean(1).sum(), model.mean)[0])
    assert both[1].abs() > 0


def test_the_variance_learns_in_float32_at_the_noisiest_step_of_an_untrained_network():
    """There x0 is guessed 5e4 away, where the decoder, which is not asked, has no gradient."""
    where, model = path.cosine(), TwoChannels().float()
    level = where.level(torch.ones(2, dtype=torch.float64))
    loss = Denoiser(model, where, LEARNED).loss(torch.rand(2, 3, 8, 8) * 2 - 1, level, torch.randn(2, 3, 8, 8))
    loss.sum().backward()
    assert model.variance.grad.isfinite()


def test_the_first_step_of_the_hybrid_loss_is_the_decoder():
    where, model = path.cosine(steps=50), TwoChannels()
    denoiser = Denoiser(model, where, LEARNED)
    x0, noise = torch.rand(2, 3, 4, dtype=torch.float64) * 2 - 1
    now = where.level(torch.full((3,), 1 / 50, dtype=torch.float64))
    x = path.expand(now.alpha, x0) * x0 + path.expand(now.sigma, x0) * noise
    guess = denoiser(x, now)
    rows = where.level(torch.tensor([1, 2], dtype=torch.float64) / 50).rows()
    small, large = small_variance(rows[1], rows[0]), large_variance(rows[0], where.data().rows()[0])
    log_var = guess.frac * math.log(large) + (1 - guess.frac) * math.log(small)
    expected = bound.decoder_nll(x0, guess.x0, log_var, 256).mean(1) / math.log(2)
    torch.testing.assert_close(bound.term(guess, x0, where, now, "learned"), expected)


def test_learned_range_wants_a_table():
    with pytest.raises(ValueError, match="learned_range needs a path with a table of betas"):
        LEARNED.check(path.VPSDE())
