"""A recipe in one file: a denoiser of pictures that learns from the absolute error of its x0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import assemble
from ldm.checkpoint import Checkpoint
from ldm.config.schema import Config, Part
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Path, expand
from ldm.diffusion.times import Uniform
from ldm.distributed import full_state
from ldm.draws import draw, stream
from ldm.pictures import to_float
from ldm.training.recipe import Network, Prepare, Recipe, Report, Setup, Start, TrainingSchema, Turn
from ldm.training.setup import prepare
from ldm.training.trainer import TrainerSettings


@dataclass(kw_only=True)
class Schema(TrainingSchema, assemble.Schema):
    """A model's axes and those of training."""

    recipe: Part = "absolute"  # type: ignore[assignment]


@dataclass(frozen=True)
class Noise:
    """What the loader's workers add to a batch."""

    seed: int
    path: Path

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        u, noise = draw(stream(self.seed, "toy"), batch["number"].tolist(), 1, batch["image"].shape[1:])
        return {**batch, "level": Uniform()(self.path, u[:, 0]), "noise": noise}  # (B,) each, (B, 3, H, W)


class Absolute(Recipe):
    """E |x0 - D(x_t)|, whose minimum is the posterior's median instead of its mean."""

    Schema = Schema

    def __init__(self, setup: Setup, denoiser: Denoiser, *, gain: float = 1.0):
        super().__init__(setup)
        self.denoiser, self.gain = denoiser, gain

    @classmethod
    def build(cls, config: Config, loaded: Mapping[str, Checkpoint], start: Start, settings: TrainerSettings) -> Recipe:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config["seed"], "init"))
            model = assemble.model(config, loaded)
        return config.build("recipe")(prepare(config, settings), model.denoiser)

    def networks(self) -> dict[str, Network]:
        return {"denoiser": Network(self.denoiser, "trained")}

    def preparation(self) -> Prepare:
        return Noise(self.seed, self.denoiser.path)

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        x0 = to_float(batch["image"]).to(self.dtype)  # (B, 3, H, W)
        level = batch["level"]
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * batch["noise"].to(x0.dtype)
        loss = self.gain * (self.denoiser(x, level).x0 - x0).abs().mean()
        return loss, {"loss/loss": loss}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"backbone.{name}": x for name, x in self.denoiser.backbone.state_dict().items()}
        return self.config, full_state(tensors, self.rank)


PARTS = {"recipe": {"absolute": f"{__name__}:Absolute"}}
