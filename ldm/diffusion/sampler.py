"""The sampling loop: a guided denoiser, a solver and a grid. Differentiable; callers switch gradients off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.path import Level
from ldm.diffusion.solvers import Noise, Step
from ldm.errors import DivergedError

OnStep = Callable[[int, Step], None]


@dataclass(frozen=True)
class Sampler:
    """Guidance, solver and grid: everything that sampling depends on besides the model, the noise and the condition."""

    guidance: Guidance
    solver: Callable[..., Iterator[Step]]
    grid: Level  # (N + 1,)

    def guided(self, denoiser: Any, negative: Condition | None) -> Any:
        """The denoiser under guidance away from `negative`; without one, the denoiser itself."""
        return denoiser if negative is None else self.guidance(denoiser, negative)

    def steps(
        self,
        denoiser: Any,
        x: Tensor,
        noise: Noise,
        condition: Condition | None = None,
        negative: Condition | None = None,
    ) -> Iterator[Step]:
        """A Step for each interval of the grid, from x (B, ...) at the grid's first level."""
        guided = self.guided(denoiser, negative)
        return self.solver(lambda x, level: guided(x, level, condition), x, self.grid, noise)

    def __call__(
        self,
        denoiser: Any,
        x: Tensor,
        noise: Noise,
        condition: Condition | None = None,
        negative: Condition | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The last x; raises DivergedError if any step was not finite, after a single read from the device."""
        finite = []
        for number, step in enumerate(self.steps(denoiser, x, noise, condition, negative)):
            x = step.x
            finite.append(x.detach().isfinite().all())
            if on_step is not None:
                on_step(number, step)
        check_finite(torch.stack(finite), self.grid)
        return x


def check_finite(finite: Tensor, grid: Level) -> None:
    """Name the first of the steps (N,) that was not finite."""
    for number, good in enumerate(finite.tolist()):
        if not good:
            row = grid.rows()[number]
            place = f"step {number + 1} of {len(finite)}, sigma {row.sigma:.4g}, t {row.t:.4g}"
            raise DivergedError("sampling produced NaN or infinity", place, hint="--precision fp32, or a smaller cfg")
