"""What a solver costs beside the network: ours and diffusers' schedulers in one run, with a denoiser that costs nothing.

python benchmarks/solvers.py [--json FILE] [--rounds N]     one thread of CPU, float32, latents of 1 x 4 x 64 x 64
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from ldm.diffusion import path, prediction, solvers
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level
from ldm.diffusion.spacing import Explicit
from ldm.training.draws import draw

SHAPE, STEPS = (1, 4, 64, 64), 50
SAMPLES, LATENT = 256, (4, 32, 32)
US = 1e6


class Stored(nn.Module):
    """A network that costs nothing: it hands back one tensor."""

    def __init__(self):
        super().__init__()
        self.y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.y


class Bend(nn.Module):
    """A smooth function of (x, t), so that the gate can tell one solver from another."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(1.5 * x.roll(1, dims=1) + t.reshape(-1, 1, 1, 1) / 250)


class Row(NamedTuple):
    """One of our solvers, the scheduler that does the same, and what we want."""

    name: str
    solver: Callable[..., Iterator[solvers.Step]]
    scheduler: str
    options: dict[str, Any]
    ratio: float | None = None  # of their time, at most
    us: float | None = None  # microseconds per step, at most
    stochastic: bool = False


TRAILING = {"timestep_spacing": "trailing"}
FULL = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # no lower order in the last steps
DPM, SINGLE, UNIPC = "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"

ROWS = [
    Row("ddim", solvers.ddim, "DDIM", {**TRAILING, "clip_sample": False}, ratio=0.5),
    Row("euler", solvers.euler, "EulerDiscrete", TRAILING, ratio=0.8),
    Row("heun", solvers.heun, "HeunDiscrete", TRAILING),
    Row("dpmpp_2m", solvers.dpmpp_2m, DPM, {**TRAILING, "solver_order": 2}, ratio=0.5),
    Row("dpmpp_3m", solvers.dpmpp_3m, DPM, {**TRAILING, "solver_order": 3}, ratio=0.5),
    Row("dpm_2s", solvers.dpm_2s, SINGLE, {"solver_order": 2, "lower_order_final": True}, ratio=0.5),
    Row("dpm_3s", solvers.dpm_3s, SINGLE, {"solver_order": 3, "lower_order_final": True}, ratio=0.5),
    Row("unipc 2", partial(solvers.unipc, order=2), UNIPC, {**TRAILING, "solver_order": 2}, ratio=0.5),
    Row("unipc 3", partial(solvers.unipc, order=3), UNIPC, {**TRAILING, **FULL, "solver_order": 3}, ratio=0.5),
    Row("flow euler", solvers.euler, "FlowMatchEulerDiscrete", {}, us=40.0),
]
