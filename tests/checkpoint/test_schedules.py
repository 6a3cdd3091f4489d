"""Schedulers of diffusers, in both directions: the same noise, times and solvers, and notes of what cannot be said."""

import diffusers
import numpy as np
import pytest
import torch

from ldm.checkpoint.schedules import path_of_betas, read_scheduler, write_scheduler
from ldm.diffusion.path import Table, cosine, linear, scaled_linear
from ldm.diffusion.spacing import Leading, Linspace, Trailing
from ldm.errors import CheckpointError
from tests.checkpoint.made_up import make

STABLE = make("sd1")[0]
SPARE = {"spacing": {"type": "linspace", "steps": 50, "spare": 1}}


def said(scheduler) -> dict:
    """What diffusers stores of one."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def made(node: dict) -> Table:
    """The path of a node."""
    kinds = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "table": Table}
    return kinds[node["type"]](**{name: x for name, x in node.items() if name != "type"})


@pytest.mark.parametrize(
    "changed",
    [
        {"solver": {"type": "ddim"}, "spacing": {"type": "trailing", "steps": 50}},
        {"solver": {"type": "heun"}, "spacing": {"type": "karras", "steps": 50}},
        {"solver": {"type": "dpmpp_2m_sde"}, **SPARE},
        {"solver": {"type": "dpmpp_3m"}, **SPARE},
        {"solver": {"type": "unipc", "order": 3}, **SPARE},
        {"path": {"type": "linear", "start": 1e-4, "end": 0.02, "zero_terminal_snr": True}},
        {"path": {"type": "table", "betas": [0.1, 0.3, 0.2], "zero_terminal_snr": True}},
        {"path": {"type": "cosine", "steps": 100}},
    ],
)
def test_a_scheduler_says_what_it_was_written_from(changed):
    notes: list[str] = []
    expected = {name: changed.get(name, STABLE[name]) for name in ("path", "prediction", "spacing", "solver")}
    found = read_scheduler(write_scheduler({**STABLE, **changed}, []), notes)
    assert {name: found[name] for name in expected if name in changed} == changed
    assert notes == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"solver": {"type": "euler"}}, []),
        ({"spacing": {"type": "leading", "steps": 20, "spare": 1}}, []),
        ({"spacing": {"type": "karras", "steps": 20}}, []),
        (
            {},
            ["diffusers' DPMSolverMultistepScheduler uses spacing.spare=1, unlike this file"],
        ),
        (
            {"spacing": {"type": "log_snr", "steps": 20}},
            ["diffusers' DPMSolverMultistepScheduler has no spacing log_snr: leading replaces it"],
        ),
        ({"solver": {"type": "dpmpp_2s"}}, ["diffusers has no scheduler for solver dpmpp_2s: DDIM replaces it"]),
        ({"solver": {"type": "euler"}, "spacing": {"type": "karras", "steps": 20}}, []),
        (
            {"solver": {"type": "ddim", "eta": 0.5}, "spacing": {"type": "karras", "steps": 20}},
            [
                "diffusers' DDIMScheduler has no eta, which is 0.5 in this file",
                "diffusers' DDIMScheduler has no spacing karras: leading replaces it",
            ],
        ),
    ],
)
def test_what_a_scheduler_cannot_say_is_told(changed, expected):
    notes: list[str] = []
    write_scheduler({**STABLE, **changed}, notes)
    assert notes == expected


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_noise_is_that_of_the_scheduler(schedule, zero):
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero, num_train_timesteps=100)
    path = made(read_scheduler(said(theirs), [])["path"])
    np.testing.assert_allclose(path.alpha[1:] ** 2, theirs.alphas_cumprod, atol=2e-6)


def test_cosines_of_other_numbers_are_written_as_their_betas():
    ours = cosine(steps=100, offset=0.05, max_beta=0.9)
    node = {"type": "cosine", "steps": 100, "offset": 0.05, "max_beta": 0.9}
    theirs = diffusers.DDIMScheduler.from_config(write_scheduler({**STABLE, "path": node}, []))
    np.testing.assert_allclose(theirs.alphas_cumprod, ours.alpha[1:] ** 2, atol=2e-6)


def test_schedulers_of_other_kinds_and_options_that_do_nothing():
    with pytest.raises(CheckpointError, match=r"another kind of noise .*; got FlowMatchEulerDiscreteScheduler; "):
        read_scheduler(said(diffusers.FlowMatchEulerDiscreteScheduler()), [])
    notes: list[str] = []
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True)
    assert read_scheduler({**said(theirs), "use_karras_sigmas": True}, notes)["spacing"]["type"] == "leading"
    assert notes == ["the scheduler's clip_sample=True is ignored"]
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    assert read_scheduler(said(theirs), notes)["solver"] == {"type": "dpmpp_2m"}
    assert notes[1:] == ["sde-dpmsolver++ of order 3 is not supported: DPM-Solver++ 2M replaces it"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_betas_of_a_small_file_are_known(dtype):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().to(dtype)
    assert path_of_betas(betas) == {"type": "scaled_linear", "start": 0.00085, "end": 0.012}


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_times_and_ends_are_those_of_their_schedulers(kind, end, spacing):
    settings = {"timestep_spacing": spacing, "final_sigmas_type": end, "steps_offset": 1}
    theirs = getattr(diffusers, kind)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)
    theirs.set_timesteps(20)
    node = read_scheduler(said(theirs), [])["spacing"] | {"steps": 20}
    rule = {"leading": Leading, "linspace": Linspace, "trailing": Trailing}[node.pop("type")](**node)
    grid = rule.grid(scaled_linear(start=0.00085, end=0.012))
    assert grid.t[:20].tolist() == theirs.timesteps.tolist()
    assert (grid.sigma / grid.alpha).tolist() == pytest.approx(theirs.sigmas[: len(grid.t)].tolist(), rel=1e-4)
