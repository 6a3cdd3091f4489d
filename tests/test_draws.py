"""Keyed draws, the times made of them, and offset noise."""

import math

import pytest
import torch

from ldm import draws
from ldm.diffusion import path, times


def test_a_sample_is_the_same_in_every_batch():
    u, noise = draws.draw(3, range(10, 20), 4, (2, 3))
    for i, number in enumerate(range(10, 20)):
        alone_u, alone_noise = draws.draw(3, [number], 4, (2, 3))
        assert torch.equal(alone_u[0], u[i])
        assert torch.equal(alone_noise[0], noise[i])


def test_the_uniforms_do_not_depend_on_the_noises_shape():
    assert torch.equal(draws.draw(0, [5], 4, (2,))[0], draws.draw(0, [5], 4, (7, 3))[0])


def test_neighbouring_seeds_and_numbers_share_nothing():
    noise = [draws.draw(s, [n], 1, (64,))[1][0] for s in range(4) for n in range(4)]
    correlation = torch.corrcoef(torch.stack(noise)) - torch.eye(16)
    assert correlation.abs().max() < 0.6
    assert len({draws.mix32(s, n) for s in range(50) for n in range(200)}) == 10_000
    assert draws.mix32(0, 1) != draws.mix32(1, 0)
    assert all(0 <= draws.mix32(s, 2**40 + s) < 2**32 for s in range(100))


def test_the_numbers_are_what_they_claim():
    u, noise = draws.draw(1, range(4000), 2, (4,))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    assert abs(noise.mean()) < 0.03
    assert abs(noise.var() - 1) < 0.03
    correlation = torch.corrcoef(torch.cat([u, noise.double()], 1).T) - torch.eye(6)
    assert correlation.abs().max() < 0.06


def even(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_uniform_visits_each_step_of_a_table_equally():
    level = times.Uniform()(path.linear(), even(3000))
    assert torch.equal(
        level.t.bincount() if level.t.dtype == torch.int64 else level.t.long().bincount(), torch.full((1000,), 3)
    )
    assert torch.equal(level.t, level.t.round())


def test_uniform_is_continuous_on_a_flow():
    torch.testing.assert_close(times.Uniform()(path.Flow(), even(1000)).sigma, even(1000).clamp(min=1e-3))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_quantiles(shift):
    """t at the quantiles of a normal distribution, shifted towards the noise."""
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)  # mean, and one deviation above it
    t = [1 / (1 + math.exp(-(0.3 + 0.7 * n))) for n in (0, 1)]
    expected = [shift * v / (1 + (shift - 1) * v) for v in t]
    level = times.LogitNormal(mean=0.3, std=0.7, shift=shift)(path.Flow(), u)
    torch.testing.assert_close(level.sigma, torch.tensor(expected, dtype=torch.float64))


def test_log_normal_quantiles_on_every_path():
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)
    for where in (path.VE(), path.Flow(), path.VPSDE()):
        level = times.LogNormal(mean=-1.2, std=1.2)(where, u)
        torch.testing.assert_close((level.sigma / level.alpha).log(), torch.tensor([-1.2, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("draw", [times.Uniform(), times.LogitNormal(), times.LogNormal(), times.Uniform(shift=2.0)])
@pytest.mark.parametrize("where", [path.cosine(), path.VE(), path.Flow(), path.VPSDE()])
def test_the_ends_of_the_unit_interval_are_finite(draw, where):
    level = draw(where, torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64))
    for field in level:
        assert field.isfinite().all()
    assert (level.sigma > 0).all()
    assert (level.sigma.diff() > 0).all()


def test_log_normal_on_a_table_means_its_steps():
    level = times.LogNormal(mean=-1.2, std=1.2)(path.cosine(), even(50))
    assert torch.equal(level.t, level.t.round())
    wanted = path.cosine().at(-(-1.2 + 1.2 * times.normal_quantile(even(50))))
    assert (level.t - wanted.t).abs().max() <= 0.5


def test_shift_moves_uniform_times_towards_the_noise():
    plain, to_device = (times.Uniform(shift=s)(path.Flow(), even(99)).sigma for s in (1.0, 3.0))
    torch.testing.assert_close(to_device, 3 * plain / (1 + 2 * plain))


def test_each_use_has_a_stream_of_its_own():
    names = ("data", "loss", "scenes", "a name longer than eight bytes", "another name longer than eight bytes")
    seeds = {draws.stream(seed, name) for seed in range(100) for name in names}
    assert len(seeds) == 100 * len(names)
    assert all(0 <= seed < 2**32 for seed in seeds)
