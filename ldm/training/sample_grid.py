"""What a model in training makes of some validation samples' conditions, beside these samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import assemble, pictures
from ldm.condition import Condition
from ldm.config.schema import Config
from ldm.diffusion.path import Path as NoisePath
from ldm.distributed import first_process

if TYPE_CHECKING:
    from pathlib import Path

    from ldm.training.recipes.diffusion import LatentDiffusionStage

SHOWN = 8


class SampleGrid:
    """The configuration's guidance, solver and grid; sample i starts from seed i, as it will in a pipeline."""

    def __init__(self, config: Config, path: NoisePath):
        self.guidance, self.solver = config.build("guidance"), assemble.solver(config)
        self.grid = assemble.grid(config, path)

    def show(self, stage: LatentDiffusionStage, sample_ids: list[Any], file: Path) -> None:
        """Pairs of a sample and what is made of its condition; every rank makes them, the first writes them."""
        batch = stage.fetched(stage.loss_by_level.data, sample_ids)
        x0 = stage.latents(batch)  # (B, C, h, w)
        made = self.latents(stage, batch, x0)
        pairs = torch.stack((stage.decode(x0), stage.decode(made)), 1).flatten(0, 1)  # (2B, 3, H, W)
        texts = {"captions": "\n".join(batch["caption"])} if "caption" in batch else {}
        first_process(lambda: pictures.write(pictures.grid(pictures.to_pil(pairs), columns=4), file, texts), stage.rank)

    def latents(self, stage: LatentDiffusionStage, batch: dict[str, Any], x0: Tensor) -> Tensor:
        """As many as x0, with the conditions of a batch."""
        drop = {part: torch.ones(len(x0), dtype=torch.bool) for part in self.guided(stage)}
        condition = stage.condition(batch, x0, {})
        denoiser: Any = self.guidance(stage.denoiser, stage.condition(batch, x0, drop)) if drop else stage.denoiser
        noise = self.noise(x0)
        x = stage.denoiser.path.prior(noise())
        for step in self.solver(bound(denoiser, condition), x, self.grid, noise):
            x = step.x
        return x.to(x0.dtype)

    def guided(self, stage: LatentDiffusionStage) -> list[str]:
        """The parts that guidance moves away from lacking."""
        return [] if self.guidance.cfg == 1 or stage.conditioner is None else stage.conditioner.guided()

    def noise(self, like: Tensor) -> Callable[[], Tensor]:
        """Noise from a generator for each sample."""
        generators = [torch.Generator().manual_seed(i) for i in range(len(like))]
        return lambda: torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)


def bound(denoiser: Any, condition: Condition | None) -> Callable[..., Any]:
    """A denoiser that is told its condition."""
    return lambda x, level: denoiser(x, level, condition)
