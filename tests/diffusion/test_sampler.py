"""The sampling loop: its gradient, its guidance, and what it says when the numbers run away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.config import parts
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.path import VPSDE, Level, Row
from ldm.diffusion.prediction import Prediction, V
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.spacing import Trailing
from ldm.errors import DivergedError

PATH = VPSDE()
GRID = Trailing(steps=3).grid(PATH)
SHAPE = (2, 3)


class Denoise:
    """A small nonlinear network: y = tanh(w x + t + pooled), w (D,)."""

    prediction = V()

    def __init__(self, w: Tensor):
        self.w = w

    def __call__(self, x: Tensor, level: Level | Row, condition: Condition | None = None) -> Prediction:
        pooled = 0.0 if condition is None or condition.pooled is None else condition.pooled
        return self.prediction.recover(x, torch.tanh(self.w * x + level.t / 1000 + pooled), level)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def condition(seed: int) -> Condition:
    return Condition(pooled=normal(seed))


@pytest.mark.parametrize("solver", parts.TABLES["solver"])
def test_gradients_are_those_of_finite_differences(solver):
    """With respect to the noise, the weights and the condition, through three guided steps."""
    sampler = Sampler(Guidance(cfg=2.0, rescale=0.3), parts.find("solver", solver), GRID)

    def sample(x: Tensor, w: Tensor, pooled: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        noise = lambda: torch.randn(SHAPE, dtype=torch.float64, generator=generator)  # noqa: E731
        return sampler(Denoise(w), x, noise, Condition(pooled=pooled), condition(4))

    inputs = [value.requires_grad_() for value in (normal(0), normal(1)[0], normal(2))]
    assert torch.autograd.gradcheck(sample, inputs)


def test_it_is_the_solver_under_guidance():
    denoiser, x, towards, away = Denoise(normal(1)[0]), normal(0), condition(2), condition(3)
    solver, guidance = parts.find("solver", "heun"), Guidance(cfg=4.0)
    guided = guidance(denoiser, away)
    steps = [*solver(lambda x, level: guided(x, level, towards), x, GRID)]
    sampler, seen = Sampler(guidance, solver, GRID), []
    last = sampler(denoiser, x, None, towards, away, lambda *step: seen.append(step))
    assert torch.equal(last, steps[-1].x)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert all(torch.equal(step.x, other.x) for (_, step), other in zip(seen, steps, strict=True))
    unguided = [*solver(lambda x, level: denoiser(x, level, towards), x, GRID)]
    assert torch.equal(sampler(denoiser, x, None, towards), unguided[-1].x), "without a negative there is no guidance"


def test_the_first_step_that_is_not_finite_is_named():
    sampler, calls = Sampler(Guidance(), parts.find("solver", "ddim"), GRID), []

    def denoise(x: Tensor, level: Row, condition: Condition | None) -> Prediction:
        calls.append(level)
        return Prediction(x * (float("nan") if len(calls) == 2 else 1), x)

    row = GRID.rows()[1]
    with pytest.raises(DivergedError, match=rf"step 2 of 3, sigma {row.sigma:.4g}, t {row.t:.4g}\)"):
        sampler(denoise, normal(0), None)
    assert len(calls) == 3, "the numbers are read once, at the end"
