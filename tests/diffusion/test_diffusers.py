"""Second implementation: our solvers against the schedulers of diffusers, one step after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import path, prediction, solvers, spacing
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level

TOLERANCE = 1e-4  # float32, relative to the root mean square of the state
STEPS = 10  # with 1000 training steps, linspace falls on whole steps too: 999, 888, ..., 0
SHAPE = (2, 3, 4, 4)

PATHS = {"linear": path.linear, "scaled_linear": path.scaled_linear}
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
TARGETS = {"epsilon": prediction.Eps, "v_prediction": prediction.V, "flow_prediction": prediction.Flow}


class Bend(nn.Module):
    """A smooth nonlinear function of (x, t) in place of a network."""

    MIX = torch.tensor([[0.9, -0.5, 0.3], [0.4, 0.8, -0.6], [-0.7, 0.2, 1.1]])

    def __init__(self, halves: int = 1):
        super().__init__()
        self.halves = halves

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.reshape(-1, 1, 1, 1) / 250  # (B, 1, 1, 1)
        mixed = torch.einsum("oc,bchw->bohw", self.MIX, x)  # (B, C, H, W)
        y = torch.sin(mixed + phase) + 0.3 * torch.tanh(x) * torch.cos(phase)  # (B, C, H, W)
        return y if self.halves == 1 else torch.cat([y, torch.tanh(mixed - phase)], dim=1)  # (B, 2C, H, W)


class Case(NamedTuple):
    """One of our solvers and the scheduler that should do the same."""

    solver: Callable[..., Any]
    scheduler: str
    options: dict[str, Any] = {}
    step_options: dict[str, Any] = {}
    scaled: bool = False  # the scheduler's state is x / alpha
    learned: bool = False


ANCESTRAL = partial(solvers.ddim, eta=1.0)
MULTISTEP = {"lower_order_final": False}  # their lower orders near the end of short runs are no part of the method

DDPM = {
    "ddpm_small": Case(ANCESTRAL, "DDPM", {"variance_type": "fixed_small", "clip_sample": False}),
    "ddpm_large": Case(solvers.ddpm, "DDPM", {"variance_type": "fixed_large", "clip_sample": False}),
    "ddpm_learned": Case(
        partial(ANCESTRAL, noise_var="learned"),
        "DDPM",
        {"variance_type": "learned_range", "clip_sample": False},
        learned=True,
    ),
}
DDIM = {
    "ddim": Case(solvers.ddim, "DDIM", {"clip_sample": False}),
    "ddim_eta": Case(partial(solvers.ddim, eta=0.7), "DDIM", {"clip_sample": False}, {"eta": 0.7}),
}
EULER = {
    "euler": Case(solvers.euler, "EulerDiscrete", scaled=True),
    "euler_ancestral": Case(solvers.euler_ancestral, "EulerAncestralDiscrete", scaled=True),
    "heun": Case(solvers.heun, "HeunDiscrete", scaled=True),
}
DPM = {
    "2m": Case(solvers.dpmpp_2m, "DPMSolverMultistep", {"solver_order": 2, **MULTISTEP}),
    "3m": Case(solvers.dpmpp_3m, "DPMSolverMultistep", {"solver_order": 3, **MULTISTEP}),
    "2m_sde": Case(
        solvers.dpmpp_2m_sde,
        "DPMSolverMultistep",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", **MULTISTEP},
    ),
}
SINGLE = {
    "2s": Case(solvers.dpm_2s, "DPMSolverSinglestep", {"solver_order": 2, "lower_order_final": True}),
    "3s": Case(solvers.dpm_3s, "DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True}),
}
UNIPC = {
    f"unipc_{order}": Case(partial(solvers.unipc, order=order), "UniPCMultistep", {"solver_order": order})
    for order in (1, 2, 3)
}
ALL = DDPM | DDIM | EULER | DPM | SINGLE | UNIPC


def make_scheduler(case: Case, steps: int, **options):
    """The scheduler, ready to step; each option must have taken effect."""
    kind = getattr(diffusers, case.scheduler + "Scheduler")
    options = case.options | options
    scheduler = kind(**options)
    scheduler.set_timesteps(steps)
    assert {name: scheduler.config[name] for name in options} == options
    return scheduler


def beta_options(betas: str, target: str) -> dict[str, Any]:
    start, end = BETAS[betas]
    return {"beta_schedule": betas, "beta_start": start, "beta_end": end, "prediction_type": target}


def their_times(scheduler) -> list[float]:
    """The scheduler's own times; Heun lists each but the first twice."""
    times = scheduler.timesteps.tolist()
    return times[:1] + times[1::2] if scheduler.order == 2 else times


def own_grid(scheduler, flow: bool = False) -> Level:
    """A grid from the scheduler's sigmas, where its rounding or interpolation is not ours."""
    sigma = scheduler.sigmas.double()  # of x / alpha, but of x itself on a flow
    if scheduler.order == 2:
        sigma = torch.cat([sigma[:1], sigma[1:-1:2], sigma[-1:]])
    alpha = 1 - sigma if flow else (1 + sigma**2).rsqrt()
    times = torch.tensor(their_times(scheduler), dtype=torch.float64)
    return Level(alpha, sigma if flow else sigma * alpha, torch.ones_like(alpha), torch.cat([times, times[-1:]]))


def noises(steps: int) -> list[Tensor]:
    return list(torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(1)))


def feed(scheduler, noise: list[Tensor], monkeypatch) -> None:
    """Have the scheduler draw these tensors."""
    stream = iter(noise)
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: next(stream))


def theirs(case: Case, scheduler, model: nn.Module, z: Tensor) -> list[Tensor]:
    """The state after each step, from z and their own start."""
    x, states = z * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        y = model(scheduler.scale_model_input(x, t), t.float().expand(len(x)))
        x = scheduler.step(y, t, x, **case.step_options).prev_sample
        states.append(x)
    return [*states[1::2], states[-1]] if scheduler.order == 2 else states


def ours(case: Case, denoiser: Denoiser, grid: Level, x: Tensor, noise: list[Tensor]) -> list[Tensor]:
    stream = iter(noise)
    return [step.x for step in case.solver(denoiser, x, grid, lambda: next(stream))]


def start(case: Case, scheduler, grid: Level, z: Tensor) -> Tensor:
    """Where the scheduler starts, as a state of ours."""
    return z * scheduler.init_noise_sigma * (grid.alpha[0].item() if case.scaled else 1)


def distances(case: Case, grid: Level, mine: list[Tensor], other: list[Tensor]) -> list[float]:
    """The largest difference after each step, relative to the state's root mean square."""
    assert len(mine) == len(other) == len(grid.t) - 1
    scale = grid.alpha[1:].tolist() if case.scaled else [1.0] * len(mine)
    return [((a - s * b).abs().max() / (s * b).square().mean().sqrt()).item() for a, b, s in zip(mine, other, scale)]


@pytest.fixture
def compare(monkeypatch, seen):
    """Run both from the same z with the same model and noise; returns the distance after each step."""

    def run(case: Case, scheduler, grid: Level, kind: path.Path, target: str, model: nn.Module | None = None):
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        halves = 2 if case.learned else 1
        row = prediction.LearnedRange(of=TARGETS[target]()) if case.learned else TARGETS[target]()
        noise = noises(len(grid.t) - 1)
        if case.scheduler == "DDPM":
            # DDPM's algorithm 2 ends without noise; their scheduler adds some unless its last time is 0
            noise[-1].zero_()
        feed(scheduler, noise, monkeypatch)
        denoiser = Denoiser(model or Bend(halves), kind, row)
        other = theirs(case, scheduler, Bend(halves), z)
        mine = ours(case, denoiser, grid, start(case, scheduler, grid, z), noise)
        if model is None:
            seen(other)
        return distances(case, grid, mine, other)

    return run


@pytest.fixture(scope="module")
def runs() -> set:
    return set()


@pytest.fixture
def seen(runs):
    """Refuse a case whose scheduler makes the very states of another one: some option has had no effect."""

    def check(states: list[Tensor]) -> None:
        key = tuple(state.sum().item() for state in states)
        assert key not in runs
        runs.add(key)

    return check


def rule(name: str, steps: int = STEPS, offset: int = 0) -> spacing.Spacing:
    if name == "leading":
        return spacing.Leading(steps=steps, offset=offset)
    return {"trailing": spacing.Trailing, "linspace": spacing.Linspace}[name](steps=steps)


def cases(table: dict[str, Case], spacings: tuple[str, ...]) -> list:
    """Every case in each spacing, target and table of betas."""
    grid = product(table.items(), spacings, ("epsilon", "v_prediction"), PATHS)
    return [pytest.param(c, *rest, id="-".join((name, *rest))) for (name, c), *rest in grid]


@pytest.mark.parametrize(
    ("case", "name", "target", "betas"),
    cases(DDPM | EULER, ("leading", "trailing", "linspace")) + cases(DDIM, ("leading", "trailing")),
)
def test_our_spacing(case, name, target, betas, compare):
    """DDPM, DDIM and the schedulers in the form of k-diffusion."""
    offset = name == "leading"
    scheduler = make_scheduler(
        case, STEPS, timestep_spacing=name, steps_offset=int(offset), **beta_options(betas, target)
    )
    kind = PATHS[betas]()
    grid = rule(name, offset=1).grid(kind)
    assert grid.t[:-1].tolist() == their_times(scheduler)
    assert max(compare(case, scheduler, grid, kind, target)) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "name", "target", "betas"), cases(DPM | {k: UNIPC[k] for k in ("unipc_1", "unipc_2")}, ("trailing",))
)
def test_our_trailing_in_higher_orders(case, name, target, betas, compare):
    scheduler = make_scheduler(case, STEPS, timestep_spacing=name, **beta_options(betas, target))
    kind = PATHS[betas]()
    grid = rule(name).grid(kind)
    assert grid.t[:-1].tolist() == their_times(scheduler)
    assert max(compare(case, scheduler, grid, kind, target)) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "name", "target", "betas"),
    cases(DPM | {k: UNIPC[k] for k in ("unipc_1", "unipc_2")}, ("leading", "linspace")),
)
def test_their_times(case, name, target, betas, compare):
    """DPM-Solver and UniPC space N + 1 times and drop the last: the list is theirs, the levels are ours."""
    scheduler = make_scheduler(case, STEPS, timestep_spacing=name, **beta_options(betas, target))
    kind = PATHS[betas]()
    grid = spacing.Explicit(times=their_times(scheduler)).grid(kind)
    assert max(compare(case, scheduler, grid, kind, target)) < TOLERANCE
