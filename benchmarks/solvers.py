"""What solvers cost beside the network: ours and diffusers' schedulers in one run, with a denoiser that costs nothing.

python -m benchmarks.solvers [--rounds N] [--json FILE]     one thread, float32, latents of 1 x 4 x 64 x 64

Times are of the CPU, which on one thread is what a clock on the wall shows if nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import process_time
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from ldm.diffusion import path, prediction, solvers
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.spacing import Explicit
from ldm.draws import draw

SHAPE, STEPS = (1, 4, 64, 64), 50
LATENT, SAMPLES = (4, 32, 32), 256


class Row(NamedTuple):
    """One of our solvers, the scheduler that does the same, and what we want of it."""

    name: str
    solver: Callable[..., Any]
    scheduler: str
    options: dict[str, Any]
    ratio: float | None = None  # at most this share of their time
    us: float | None = None  # at most so many microseconds per step


TRAILING = {"timestep_spacing": "trailing"}
FULL = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # order 3 to the end, for the same work
DPM, SINGLE, UNIPC = "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"

ROWS = [
    Row("ddim", solvers.ddim, "DDIM", TRAILING | {"clip_sample": False}, ratio=0.5),
    Row("dpmpp_2m", solvers.dpmpp_2m, DPM, TRAILING | {"solver_order": 2}, ratio=0.5),
    Row("dpmpp_3m", solvers.dpmpp_3m, DPM, TRAILING | {"solver_order": 3}, ratio=0.5),
    Row("dpmpp_2s", solvers.dpmpp_2s, SINGLE, {"solver_order": 2, "lower_order_final": True}, ratio=0.5),
    Row("dpmpp_3s", solvers.dpmpp_3s, SINGLE, {"solver_order": 3, "lower_order_final": True}, ratio=0.5),
    Row("unipc, order 2", partial(solvers.unipc, order=2), UNIPC, TRAILING | {"solver_order": 2}, ratio=0.5),
    Row("unipc, order 3", partial(solvers.unipc, order=3), UNIPC, TRAILING | FULL | {"solver_order": 3}, ratio=0.5),
    Row("euler", solvers.euler, "EulerDiscrete", TRAILING, ratio=0.8),
    Row("euler on flow", solvers.euler, "FlowMatchEulerDiscrete", {}, us=40.0),
]


class Stored(nn.Module):
    """A network that costs nothing: it hands back one tensor."""

    def __init__(self):
        super().__init__()
        self.y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.y


class Bend(nn.Module):
    """A smooth function of (x, t), on which no two solvers agree."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(1.5 * x.roll(1, dims=1) + t.reshape(-1, 1, 1, 1) / 250)


class Pair:
    """The same samples in two ways."""

    def __init__(self, row: Row, network: nn.Module):
        self.solver, self.network = row.solver, network
        flow = row.scheduler.startswith("Flow")
        self.scheduler = getattr(diffusers, row.scheduler + "Scheduler")(**row.options)
        self.scheduler.set_timesteps(STEPS)
        on, target = (path.Flow(), prediction.Flow()) if flow else (path.linear(), prediction.Eps())
        end = "table" if "final_sigmas_type" in row.options else "zero"
        self.grid = Explicit(times=self.scheduler.timesteps.tolist(), end=end).grid(on)
        self.denoiser = Denoiser(network, on, target)
        self.z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        # Euler's state is x / alpha
        self.alpha = self.grid.alpha[0].item() if row.scheduler == "EulerDiscrete" else 1.0
        self.scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def ours(self) -> tuple[Tensor, float]:
        """The sample, and the CPU seconds of its loop."""
        x = self.z * self.scale * self.alpha
        begin = process_time()
        for step in self.solver(self.denoiser, x, self.grid):
            x = step.x
        return x, process_time() - begin

    def theirs(self) -> tuple[Tensor, float]:
        """The sample, and the CPU seconds of its loop, in the form that asks least of the scheduler."""
        scheduler, network, x = self.scheduler, self.network, self.z * self.scale
        scheduler.set_timesteps(STEPS)
        scale = getattr(scheduler, "scale_model_input", None)
        begin = process_time()
        for t in scheduler.timesteps:
            y = network(x if scale is None else scale(x, t), t)
            x = scheduler.step(y, t, x, return_dict=False)[0]
        return x, process_time() - begin


def gate(row: Row) -> float:
    """Nothing is timed before both make the same samples; returns how far apart they are."""
    pair = Pair(row, Bend())
    ours, theirs = pair.ours()[0], pair.theirs()[0]
    distance = ((ours - theirs).abs().max() / theirs.square().mean().sqrt()).item()
    if not distance < 1e-4:
        raise SystemExit(f"{row.name}: not the same sampler, {distance:.1e} apart")
    return distance


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int, units: int) -> dict[str, Any]:
    """Medians of microseconds per unit and of the paired ratio, over rounds of A B B A."""
    mine, other = [], []
    for _ in range(rounds):
        first, *between, last = ours(), theirs(), theirs(), ours()
        mine.append((first + last) / 2)
        other.append(sum(between) / 2)
    ratios = [a / b for a, b in zip(mine, other)]
    tenths = quantiles(ratios, n=10)
    us = {"ours_us": 1e6 * median(mine) / units, "theirs_us": 1e6 * median(other) / units}
    return {**us, "ratio": median(ratios), "spread": [tenths[0], tenths[-1]]}


def time_row(row: Row, rounds: int) -> dict[str, Any]:
    """The figures of one solver."""
    apart, pair = gate(row), Pair(row, Stored())
    pair.ours(), pair.theirs()  # warm
    figures = alternate(lambda: pair.ours()[1], lambda: pair.theirs()[1], rounds, STEPS)
    passed = figures["ratio"] <= row.ratio if row.ratio else figures["ours_us"] <= row.us
    target = f"<= {row.ratio}" if row.ratio else f"<= {row.us:g} us"
    return {"solver": row.name, **figures, "apart": apart, "target": target, "passed": passed}


def clock(function: Callable[[], Any]) -> float:
    begin = process_time()
    function()
    return process_time() - begin


def time_draws(rounds: int) -> dict[str, Any]:
    """The keyed draw of training, per sample, beside one big randn."""
    keyed = partial(draw, 0, range(SAMPLES), 4, LATENT)
    big = partial(torch.randn, SAMPLES, *LATENT)
    return alternate(lambda: clock(keyed), lambda: clock(big), rounds, SAMPLES)


def show(rows: list[dict[str, Any]], draws: dict[str, Any]) -> None:
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, one thread, {SHAPE} float32, {STEPS} steps")
    print(f"{'solver':16}{'ours us':>9}{'theirs us':>11}{'ratio':>7}  {'10% to 90%':12}{'target':>10}  pass")
    for row in rows:
        low, high = row["spread"]
        numbers = f"{row['ours_us']:9.1f}{row['theirs_us']:11.1f}{row['ratio']:7.2f}  {low:4.2f} to {high:4.2f}"
        print(f"{row['solver']:16}{numbers}{row['target']:>12}  {'yes' if row['passed'] else 'NO'}")
    print(
        f"keyed draw of {LATENT}: {draws['ours_us']:.1f} us a sample, "
        f"one randn of {SAMPLES}: {draws['theirs_us']:.1f} us, ratio {draws['ratio']:.2f}"
    )


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds of A B B A per row")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [time_row(row, options.rounds) for row in ROWS]
        draws = time_draws(options.rounds)
    show(rows, draws)
    if options.json:
        options.json.write_text(json.dumps({"solvers": rows, "draws": draws}, indent=2) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
