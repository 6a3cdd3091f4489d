"""Second implementation: our solvers against the schedulers of diffusers, one step after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import path, prediction, solvers, spacing
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-4  # float32, relative to the root mean square of the state
STEPS = 10  # of 1000: linspace falls on whole steps too, 999, 888, ..., 0
SHAPE = (2, 3, 4, 4)

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
PATHS = {"linear": path.linear, "scaled_linear": path.scaled_linear}
TARGETS = {"epsilon": prediction.Eps, "v_prediction": prediction.V, "flow_prediction": prediction.Flow}


class Bend(nn.Module):
    """A smooth nonlinear function of (x, t) in place of a network; with two halves, the second says a variance."""

    MIX = torch.tensor([[0.9, -0.5, 0.3], [0.4, 0.8, -0.6], [-0.7, 0.2, 1.1]])

    def __init__(self, halves: int = 1):
        super().__init__()
        self.halves = halves

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.reshape(-1, 1, 1, 1) / 250  # (B, 1, 1, 1)
        mixed = torch.einsum("oc,bchw->bohw", self.MIX, x)  # (B, C, H, W)
        y = torch.sin(mixed + phase) + 0.3 * torch.tanh(x) * torch.cos(phase)  # (B, C, H, W)
        return y if self.halves == 1 else torch.cat([y, torch.tanh(mixed - phase)], dim=1)  # (B, 2C, H, W)


NONE: Mapping[str, Any] = MappingProxyType({})


class Case(NamedTuple):
    """One of our solvers, and the scheduler and options that say the same."""

    solver: Callable[..., Any]
    scheduler: str
    options: Mapping[str, Any] = NONE
    step_options: Mapping[str, Any] = NONE
    ratio: bool = False  # the scheduler's state is x / alpha, as in k-diffusion


ancestral = partial(solvers.ddim, eta=1.0)
ancestral_learned = partial(solvers.ddim, eta=1.0, noise_var="learned")
# clipping suits images in [-1, 1] alone; lower orders near the end of short runs are no part of a method
PLAIN, FULL = {"clip_sample": False}, {"lower_order_final": False}

DDPM = {
    "ddpm_small": Case(ancestral, "DDPM", PLAIN | {"variance_type": "fixed_small"}),
    "ddpm_large": Case(solvers.ddpm, "DDPM", PLAIN | {"variance_type": "fixed_large"}),
    "ddpm_learned": Case(ancestral_learned, "DDPM", PLAIN | {"variance_type": "learned_range"}),
}
DDIM = {
    "ddim": Case(solvers.ddim, "DDIM", PLAIN),
    "ddim_eta": Case(partial(solvers.ddim, eta=0.7), "DDIM", PLAIN, {"eta": 0.7}),
}
EULER = {
    "euler": Case(solvers.euler, "EulerDiscrete", ratio=True),
    "euler_ancestral": Case(solvers.euler_ancestral, "EulerAncestralDiscrete", ratio=True),
    "heun": Case(solvers.heun, "HeunDiscrete", ratio=True),
}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTI = {
    "2m": Case(solvers.dpmpp_2m, "DPMSolverMultistep", FULL | {"solver_order": 2}),
    "3m": Case(solvers.dpmpp_3m, "DPMSolverMultistep", FULL | {"solver_order": 3}),
    "2m_sde": Case(solvers.dpmpp_2m_sde, "DPMSolverMultistep", FULL | SDE | {"solver_order": 2}),
    "unipc_1": Case(partial(solvers.unipc, order=1), "UniPCMultistep", {"solver_order": 1, "solver_type": "bh2"}),
    "unipc_2": Case(partial(solvers.unipc, order=2), "UniPCMultistep", {"solver_order": 2, "solver_type": "bh2"}),
}
UNIPC_3 = {"unipc_3": Case(partial(solvers.unipc, order=3), "UniPCMultistep", {"solver_order": 3})}
SINGLE = {
    "2s": Case(solvers.dpmpp_2s, "DPMSolverSinglestep", {"solver_order": 2, "lower_order_final": True}),
    "3s": Case(solvers.dpmpp_3s, "DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True}),
}
ALL = DDPM | DDIM | EULER | MULTI | UNIPC_3 | SINGLE
FLOW_EULER = Case(solvers.euler, "FlowMatchEulerDiscrete")


def make_scheduler(case: Case, steps: int = STEPS, **options):
    """The scheduler, ready to step; every option must stand in its configuration."""
    options = case.options | options
    scheduler = getattr(diffusers, case.scheduler + "Scheduler")(**options)
    scheduler.set_timesteps(steps)
    assert {name: scheduler.config[name] for name in options} == options
    return scheduler


def on_table(betas: str, target: str) -> dict[str, Any]:
    low, high = BETAS[betas]
    return {"beta_schedule": betas, "beta_start": low, "beta_end": high, "prediction_type": target}


def their_times(scheduler) -> list[float]:
    """The scheduler's own times; Heun lists all but the first twice."""
    times = scheduler.timesteps.tolist()
    return times[:1] + times[1::2] if scheduler.order == 2 else times


def our_grid(name: str, steps: int = STEPS, offset: int = 1) -> spacing.Spacing:
    """The rule of this name; diffusers' steps_offset belongs to `leading` alone."""
    if name == "leading":
        return spacing.Leading(steps=steps, offset=offset)
    return {"trailing": spacing.Trailing, "linspace": spacing.Linspace}[name](steps=steps)


def their_grid(scheduler, flow: bool = False) -> Level:
    """The scheduler's own levels, where it rounds or interpolates otherwise than we do."""
    sigma = scheduler.sigmas.double()  # of x / alpha, but of x itself on a flow
    if scheduler.order == 2:
        sigma = torch.cat([sigma[:1], sigma[1::2]])
    alpha = 1 - sigma if flow else (1 + sigma**2).rsqrt()
    times = their_times(scheduler)
    times = torch.tensor([*times, times[-1]], dtype=torch.float64)
    return Level(alpha, sigma if flow else sigma * alpha, torch.ones_like(alpha), times)


def their_states(case: Case, scheduler, z: Tensor, model: nn.Module) -> list[Tensor]:
    """The state after each step, from their own start."""
    x, states = z * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else z, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t.float().expand(len(x))), t, x, **case.step_options).prev_sample
        states.append(x)
    return [*states[1::2], states[-1]] if scheduler.order == 2 else states


def our_states(case: Case, denoiser: Denoiser, grid: Level, x: Tensor, noise: Iterable[Tensor]) -> list[Tensor]:
    stream = iter(noise)
    return [step.x for step in case.solver(denoiser, x, grid, lambda: next(stream))]


def distances(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """The largest difference after each step, relative to the state's root mean square."""
    assert len(ours) == len(theirs)
    return [((a - b).abs().max() / b.square().mean().sqrt()).item() for a, b in zip(ours, theirs)]


def make_noise(case: Case, steps: int) -> list[Tensor]:
    noise = torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(1))
    if case.scheduler == "DDPM":
        noise[-1] = 0  # algorithm 2 of DDPM ends without noise; their scheduler adds some if its last time is not 0
    return list(noise)


@pytest.fixture
def measure(monkeypatch):
    """Run both from one z, with one model and the same noise, and hand back (ours, theirs) after each step."""

    def run(case: Case, scheduler, grid: Level, on: path.Path, model: type[Bend] = Bend):
        learned = scheduler.config.get("variance_type") == "learned_range"
        halves = 2 if learned else 1
        target = TARGETS[scheduler.config.get("prediction_type", "flow_prediction")]()
        target = prediction.LearnedRange(of=target) if learned else target
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        noise = make_noise(case, len(grid.t) - 1)
        stream = iter(noise)
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(stream), raising=False)
        theirs = their_states(case, scheduler, z, Bend(halves))
        if case.ratio:
            alpha, *later = their_grid(scheduler).alpha.tolist()
            z = z * scheduler.init_noise_sigma * alpha
            theirs = [x * alpha for x, alpha in zip(theirs, later)]
        return our_states(case, Denoiser(model(halves), on, target), grid, z, noise), theirs

    return run


@pytest.fixture(scope="module")
def seen() -> set:
    return set()


@pytest.fixture
def agree(measure, seen):
    """Both states are the same after every step, and no other case had those: an option without effect would."""

    def check(case: Case, scheduler, grid: Level, on: path.Path, but: int = 0) -> None:
        ours, theirs = measure(case, scheduler, grid, on)
        key = tuple(x.double().sum().item() for x in theirs)
        assert key not in seen
        seen.add(key)
        found = distances(ours, theirs)
        assert all(distance < TOLERANCE for distance in found[: len(found) - but]), found

    return check


def table(cases: dict[str, Case], *spacings: str) -> list:
    """Every case with every spacing, target and table of betas."""
    rows = product(cases.items(), spacings, ("epsilon", "v_prediction"), PATHS)
    return [pytest.param(case, *rest, id="-".join([name, *rest])) for (name, case), *rest in rows]


EVERY = "case, spaced, target, betas"


@pytest.mark.parametrize(
    EVERY, table(DDPM | EULER, "leading", "trailing", "linspace") + table(DDIM, "leading", "trailing")
)
def test_our_spacings(case, spaced, target, betas, agree):
    """DDPM, DDIM and k-diffusion's schedulers walk our grids."""
    scheduler = make_scheduler(
        case, timestep_spacing=spaced, steps_offset=int(spaced == "leading"), **on_table(betas, target)
    )
    on = PATHS[betas]()
    grid = our_grid(spaced).grid(on)
    assert grid.t[:-1].tolist() == their_times(scheduler)
    agree(case, scheduler, grid, on)


@pytest.mark.parametrize(EVERY, table(MULTI, "leading", "trailing", "linspace"))
def test_multistep(case, spaced, target, betas, agree):
    scheduler = make_scheduler(case, timestep_spacing=spaced, **on_table(betas, target))
    times, on = their_times(scheduler), PATHS[betas]()
    if spaced == "trailing":
        assert our_grid(spaced).grid(on).t[:-1].tolist() == times
    # for leading and linspace they space N + 1 times and drop the last: the list is theirs, the levels are ours
    agree(case, scheduler, spacing.Explicit(times=times).grid(on), on)


@pytest.mark.parametrize("steps", [10, 11, 12])  # every remainder of groups of two and of three
@pytest.mark.parametrize(EVERY, table(SINGLE, "linspace"))
def test_singlestep(case, spaced, target, betas, steps, agree):
    scheduler = make_scheduler(case, steps, **on_table(betas, target))
    on = PATHS[betas]()
    agree(case, scheduler, spacing.Explicit(times=their_times(scheduler)).grid(on), on)


@pytest.mark.parametrize(EVERY, table(UNIPC_3, "leading", "trailing", "linspace"))
def test_unipc_3(case, spaced, target, betas, agree):
    """They end with a step of order 2 and one of order 1, we with one of order 1: the last two are left out."""
    scheduler = make_scheduler(case, timestep_spacing=spaced, **on_table(betas, target))
    on = PATHS[betas]()
    agree(case, scheduler, spacing.Explicit(times=their_times(scheduler)).grid(on), on, but=2)


@pytest.mark.parametrize(EVERY, table(DDIM, "leading"))
def test_ddim_ends_at_the_table(case, spaced, target, betas, agree):
    """As Stable Diffusion's own sampler does."""
    scheduler = make_scheduler(case, set_alpha_to_one=False, steps_offset=1, **on_table(betas, target))
    on = PATHS[betas]()
    agree(case, scheduler, spacing.Leading(steps=STEPS, end="table").grid(on), on)


@pytest.mark.parametrize(EVERY, table(MULTI | UNIPC_3 | SINGLE, "linspace"))
def test_higher_orders_end_at_the_table(case, spaced, target, betas, agree):
    """Full order to the last step, with no edge where sigma = 0."""
    case = case._replace(options=case.options | FULL | {"final_sigmas_type": "sigma_min"})
    scheduler = make_scheduler(case, 12, **on_table(betas, target))
    on = PATHS[betas]()
    # float32 makes their 1 - abar_0 wrong by up to 3e-4 of itself, which the third order multiplies: their own levels
    grid = their_grid(scheduler)
    ours = spacing.Explicit(times=their_times(scheduler), end="table").grid(on)
    assert torch.allclose(ours.log_snr, grid.log_snr, rtol=0, atol=1e-4)
    agree(case, scheduler, grid, on)


@pytest.mark.parametrize("betas", PATHS)
@pytest.mark.parametrize("case", DDIM.values(), ids=DDIM)
def test_ddim_in_all_steps(case, betas, agree):
    """The one linspace on which DDIM's own step, T // N, leads from each of its times to the next."""
    scheduler = make_scheduler(case, 1000, timestep_spacing="linspace", **on_table(betas, "epsilon"))
    on = PATHS[betas]()
    grid = our_grid("linspace", 1000).grid(on)
    assert grid.t[:-1].tolist() == their_times(scheduler)
    agree(case, scheduler, grid, on)


@pytest.mark.parametrize(("spaced", "steps"), [("linspace", 10), ("trailing", 30)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_beside_its_times(spaced, steps, eta, agree):
    """Elsewhere it steps to t - T // N, though it is called at another time next: our step from each t to there."""
    case = Case(None, "DDIM", PLAIN, {"eta": eta})
    scheduler = make_scheduler(case, steps, timestep_spacing=spaced, **on_table("scaled_linear", "epsilon"))
    on = path.scaled_linear()
    grid = spacing.Explicit(times=their_times(scheduler)).grid(on)
    onto = spacing.Explicit(times=[t - 1000 // steps for t in their_times(scheduler)][:-1]).grid(on)

    def walk(denoise, x, grid, noise):
        for now, next in zip(grid.rows(), onto.rows()):
            step = solvers.ddim_step(x, denoise(x, now), now, next, eta, noise)
            x = step.x
            yield step

    agree(case._replace(solver=walk), scheduler, grid, on)


@pytest.mark.parametrize(EVERY, table(EULER, "linspace"))
def test_times_between_steps(case, spaced, target, betas, agree):
    """Between two steps of the table, k-diffusion's schedulers interpolate sigma / alpha, we the log-SNR: theirs."""
    scheduler = make_scheduler(case, 20, timestep_spacing=spaced, **on_table(betas, target))
    assert any(t % 1 for t in their_times(scheduler))
    agree(case, scheduler, their_grid(scheduler), PATHS[betas]())


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_karras(name, target, agree):
    scheduler = make_scheduler(EULER[name], use_karras_sigmas=True, **on_table("scaled_linear", target))
    on = path.scaled_linear()
    grid = spacing.Karras(steps=STEPS).grid(on)
    assert grid.t[:-1].tolist() == pytest.approx(their_times(scheduler), abs=0.02)
    agree(EULER[name], scheduler, grid, on)


ZERO = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize("betas", PATHS)
@pytest.mark.parametrize(("name", "spaced"), [*product(DDPM, ("trailing", "linspace")), *product(DDIM, ("trailing",))])
def test_zero_terminal_snr(name, spaced, betas, agree):
    """From alpha = 0, as in DDIM and DDPM."""
    case = ALL[name]
    scheduler = make_scheduler(case, timestep_spacing=spaced, **ZERO, **on_table(betas, "v_prediction"))
    on = PATHS[betas](zero_terminal_snr=True)
    grid = our_grid(spaced).grid(on)
    assert grid.alpha[0] == 0 == scheduler.alphas_cumprod[-1]
    assert grid.t[:-1].tolist() == their_times(scheduler)
    agree(case, scheduler, grid, on)


ALMOST = {name: case for name, case in (EULER | MULTI).items() if name != "heun"}  # whose scheduler does not rescale


@pytest.mark.parametrize("betas", PATHS)
@pytest.mark.parametrize("spaced", ["trailing", "linspace"])
@pytest.mark.parametrize("case", ALMOST.values(), ids=ALMOST)
def test_almost_zero_terminal_snr(case, spaced, betas, agree):
    """The others put abar_T at 2^-24 and let history reach across it: their levels, on which we do as well."""
    # in 50 steps: from sigma / alpha = 4096 to 18, in 10, float32 leaves Euler's state in k-diffusion's form 5e-5 off
    scheduler = make_scheduler(case, 50, timestep_spacing=spaced, **ZERO, **on_table(betas, "v_prediction"))
    grid = their_grid(scheduler)
    assert grid.alpha[0].item() == pytest.approx(2**-12, rel=1e-5)
    agree(case, scheduler, grid, PATHS[betas](zero_terminal_snr=True))


def test_flow_from_linspace(agree):
    scheduler = make_scheduler(FLOW_EULER)
    grid = spacing.Linspace(steps=STEPS).grid(path.Flow())
    assert grid.t[:-1].tolist() == pytest.approx(their_times(scheduler))
    agree(FLOW_EULER, scheduler, grid, path.Flow())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_from_trailing(shift, agree):
    """The sigmas that their pipelines pass, 1, 1 - 1/N, ..., 1/N before the shift."""
    scheduler = make_scheduler(FLOW_EULER, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    grid = spacing.Trailing(steps=STEPS, shift=shift).grid(path.Flow())
    assert grid.t[:-1].tolist() == pytest.approx(their_times(scheduler))
    agree(FLOW_EULER, scheduler, grid, path.Flow())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", MULTI | SINGLE)
def test_higher_orders_on_flow(name, shift, agree):
    """Their flow grids begin just below t = 1 and tell the network whole times: their levels."""
    case = (MULTI | SINGLE)[name]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = make_scheduler(case, **flow)
    agree(case, scheduler, their_grid(scheduler, flow=True), path.Flow())


@pytest.mark.parametrize("steps", [7, 16, 30, 32, 80])
def test_trailing_rounds_as_published(steps):
    """Steps are counted from 1 when they are rounded (Lin et al. 2023, table 2), which decides where a half goes."""
    times = their_times(make_scheduler(DDIM["ddim"], steps, timestep_spacing="trailing"))
    assert spacing.Trailing(steps=steps).levels(path.linear()).t.tolist() == times


@pytest.mark.parametrize("steps", [3, 5, 28, 30, 75])
def test_linspace_rounds_as_numpy(steps):
    times = their_times(make_scheduler(DDIM["ddim"], steps, timestep_spacing="linspace"))
    assert spacing.Linspace(steps=steps).levels(path.linear()).t.tolist() == times


class Flipped(Bend):
    """The model with the wrong sign."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().forward(x, t)


def swapped(grid: Level) -> Level:
    """Two neighbouring levels exchanged, each time left in its place."""
    order = [0, 1, 2, 3, 5, 4, *range(6, len(grid.t))]
    return grid._replace(alpha=grid.alpha[order], sigma=grid.sigma[order])


def late(grid: Level) -> Level:
    """Each level told as the one before it."""
    return grid._replace(t=torch.cat([grid.t[:1], grid.t[:-1]]))


@pytest.fixture
def worst(measure):
    """The largest distance to a scheduler of a run made wrong on purpose, but for the last two steps (of UniPC-3)."""

    def run(case: Case, spoil=lambda grid: grid, model: type[Bend] = Bend) -> float:
        scheduler = make_scheduler(case, 11, **on_table("scaled_linear", "epsilon"))
        on = path.scaled_linear()
        grid = their_grid(scheduler) if case.ratio else spacing.Explicit(times=their_times(scheduler)).grid(on)
        return max(distances(*measure(case, scheduler, spoil(grid), on, model))[:-2])

    return run


FOUND = 100 * TOLERANCE


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_a_wrong_model_is_found(case, worst):
    """It bends enough that a wrong sign or wrong times cannot pass."""
    assert worst(case) < TOLERANCE
    assert worst(case, model=Flipped) > FOUND
    assert worst(case, spoil=late) > FOUND


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "2m", "3m", "unipc_1", "unipc_2", "unipc_3", "2s", "3s"])
def test_wrong_levels_are_found(name, worst):
    assert worst(ALL[name], spoil=swapped) > FOUND


LOWER = {"ddim_eta": "ddim", "heun": "euler", "2m": "ddim", "3m": "2m", "2m_sde": "2m", "2s": "ddim", "3s": "2s"}
LOWER |= {"unipc_1": "ddim", "unipc_2": "unipc_1", "unipc_3": "unipc_2", "ddpm_large": "ddpm_small"}


@pytest.mark.parametrize(("name", "lower"), LOWER.items())
def test_a_lower_order_is_found(name, lower, worst):
    """So is the wrong noise."""
    assert worst(ALL[name]._replace(solver=ALL[lower].solver)) > FOUND
