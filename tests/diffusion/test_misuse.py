"""What does not fit is refused in words, and what was forgotten once is not forgotten again."""

import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import bound, path, prediction, solvers, spacing
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierGuided, Guidance
from tests.diffusion.closed_form import MIXTURE, Exact, last, noise_of

GRID = spacing.Trailing(steps=4).grid(path.cosine())
X = torch.randn(3, 2, dtype=torch.float64)


class Told(nn.Module):
    """A backbone whose output depends on all that it is told."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.channels = channels

    def forward(self, x, t, tokens=None, mask=None, pooled=None):
        told = sum(v.float().mean() for v in (tokens, mask, pooled) if v is not None)
        return (x[:, :2] * 0.5 + told + t[:, None] / 1000).repeat(1, self.channels)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "ddpm", "dpmpp_2m_sde"])
def test_a_stochastic_solver_wants_noise(name):
    solver = getattr(solvers, name)
    if name == "ddim":
        last(solver(Exact(MIXTURE), X, GRID))  # eta = 0 wants none
    else:
        with pytest.raises(ValueError, match="noise: a stochastic solver needs noise"):
            last(solver(Exact(MIXTURE), X, GRID))


@pytest.mark.parametrize(
    ("solver", "numbers", "message"),
    [
        (solvers.ddim, {"eta": 1.5}, "eta: out of range; got 1.5"),
        (solvers.ddim, {"eta": float("nan")}, "eta: out of range; got nan"),
        (solvers.ddim, {"noise_var": "smal"}, "noise_var: unknown; got smal"),
        (solvers.unipc, {"order": 0}, "order: unknown; got 0"),
        (solvers.multistep, {"order": 4}, "order: unknown; got 4"),
        (solvers.singlestep, {"order": -1}, "order: unknown; got -1"),
    ],
)
def test_numbers_that_mean_nothing(solver, numbers, message):
    with pytest.raises(ValueError, match=message):
        last(solver(Exact(MIXTURE), X, GRID, noise_of(0, X), **numbers))


def test_the_output_of_a_backbone_must_fit():
    with pytest.raises(ValueError, match=r"output has the wrong shape; got shape \(3, 4\); expected \(3, 2\)"):
        Denoiser(Told(channels=2), path.cosine(), prediction.V())(X.float(), GRID.rows()[1])
    learned = prediction.LearnedRange(of=prediction.V())
    with pytest.raises(ValueError, match=r"got shape \(3, 2\); expected \(3, 4\)"):
        Denoiser(Told(), path.cosine(), learned)(X.float(), GRID.rows()[1])


def test_a_half_precision_network_under_a_float32_sampler():
    class Linear(nn.Linear):
        def forward(self, x, t):
            outputs.append(super().forward(x))
            return outputs[-1]

    outputs: list[torch.Tensor] = []
    denoiser = Denoiser(Linear(2, 2), path.cosine(), prediction.V())
    with torch.autocast("cpu", torch.bfloat16):
        steps = list(solvers.dpmpp_2m(denoiser, X.half(), GRID))
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert {step.x.dtype for step in steps} == {torch.float32}


@pytest.mark.parametrize("field", ["tokens", "mask", "pooled"])
def test_each_field_of_a_condition_reaches_the_network_in_loss_and_bound(field):
    where = path.linear(start=1e-2, end=0.4, steps=5)
    denoiser, x0, noise = Denoiser(Told(), where, prediction.V()), X.float(), torch.ones(3, 2)
    level = where.level(torch.full((3,), 0.6, dtype=torch.float64))
    one, other = (Condition(**{field: torch.full((3, 4), v)}) for v in (0.0, 1.0))
    assert (denoiser.loss(x0, level, noise, one) - denoiser.loss(x0, level, noise, other)).abs().min() > 1e-3
    totals = [bound.bits_per_dim(denoiser, x0, lambda: noise, c).total for c in (one, other)]
    assert (totals[0] - totals[1]).abs().min() > 1e-3


def test_the_input_is_scaled_for_a_whole_batch_as_for_each_sample():
    """Sampling on a VE path: c_in of a Row and of a Level."""
    where = path.VE()
    denoiser, x = Denoiser(Told(), where, prediction.EDM(sigma_data=0.5)), X.float()
    level = where.level(torch.full((3,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(denoiser.output(x, level), denoiser.output(x, level.rows()[0]))
    unscaled = x * 0.5 + level.t[0].float() / 1000
    assert (denoiser.output(x, level) - unscaled).abs().max() > 1e-2


def test_learned_variance_needs_its_channels_in_the_bound():
    where = path.linear(start=1e-2, end=0.4, steps=5)
    for kind, message in (("learned", "learned needs a model"), ("smal", "noise_var: unknown")):
        with pytest.raises(ValueError, match=message):
            bound.bits_per_dim(Denoiser(Told(), where, prediction.V()), X.float(), lambda: X.float(), noise_var=kind)


def test_the_hybrid_loss_counts_the_steps_of_its_own_table():
    """The bound's share is proportional to T: the same level in tables that agree there."""
    shares = []
    for steps in (10, 20):
        where = path.Table(betas=[0.1] * steps)
        learned = prediction.LearnedRange(of=prediction.V())
        level = where.level(torch.full((3,), 5 / steps, dtype=torch.float64))
        whole = Denoiser(Told(channels=2), where, learned).loss(X.float(), level, torch.ones(3, 2))
        shares.append(whole - Denoiser(Told(), where, prediction.V()).loss(X.float(), level, torch.ones(3, 2)))
    torch.testing.assert_close(shares[1], 2 * shares[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_the_decoders_cells_cover_the_line_for_any_number_of_bins(bins):
    values = torch.linspace(-1, 1, bins, dtype=torch.float64)
    nll = bound.decoder_nll(values, torch.full_like(values, 0.2), torch.full_like(values, -1.0), bins)
    assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("t", [1e-5, 0.0004, 0.9992, 0.9996, 0.99999])
def test_between_a_table_and_infinity_levels_are_finite(t):
    level = path.linear(zero_terminal_snr=True).level(torch.tensor([t], dtype=torch.float64))
    assert all(field.isfinite().all() for field in level)
    assert level.alpha.item() ** 2 + level.sigma.item() ** 2 == pytest.approx(1)


def test_every_step_of_a_table_is_exact_from_float32_times():
    where = path.cosine(steps=4000)
    k = torch.arange(4000)
    assert torch.equal(where.level((k + 1).float() / 4000).alpha, where.alpha[1:])


def test_a_flow_that_ends_early_is_spaced_and_drawn_to_its_end():
    where = path.Flow(last=0.9)
    grid = spacing.Trailing(steps=3).grid(where)
    torch.testing.assert_close(grid.sigma, torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(where.level(where.time(grid.t[:3])).sigma, grid.sigma[:3])


def test_leading_counts_from_its_offset():
    where = path.scaled_linear()
    assert spacing.Leading(steps=4, offset=0).grid(where).t.tolist() == [750, 500, 250, 0, 0]
    assert spacing.Leading(steps=4, offset=7).grid(where).t.tolist()[:4] == [757, 507, 257, 7]


def test_classifier_guidance_works_in_inference_mode():
    guided = ClassifierGuided(Exact(MIXTURE), lambda x, level: -(x**2).sum(1))
    with torch.inference_mode():
        found = guided(X * 1, GRID.rows()[1])
    torch.testing.assert_close(found.eps, guided(X, GRID.rows()[1]).eps)


def test_conditions_that_do_not_fit_each_other_are_refused():
    guided = Guidance(cfg=2.0)(Exact(MIXTURE), Condition(tokens=torch.zeros(3, 4, 2)))
    with pytest.raises(ValueError, match=r"condition.tokens: shapes differ; got \(3, 5, 2\) and \(3, 4, 2\)"):
        guided(X, GRID.rows()[1], Condition(tokens=torch.zeros(3, 5, 2)))


def test_guidance_of_the_mean_with_a_learned_variance_ends_finite():
    class Learned(Exact):
        def __call__(self, x, level, condition=None):
            return super().__call__(x, level)._replace(frac=torch.full_like(x, 1.2))

    guided = ClassifierGuided(Learned(MIXTURE), lambda x, level: -(x**2).sum(1), form="mean")
    assert last(solvers.ddim(guided, X, GRID, noise_of(1, X), eta=1.0, noise_var="learned")).isfinite().all()
