"""The one place where parts meet: from a checked configuration to the objects that need one another."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldm.config import Config
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level, Path


def denoiser(config: Config, **shapes: Any) -> Denoiser:
    """The backbone on its path with its prediction; `shapes` is what the data say of the backbone's ends."""
    path = config.build("path")
    prediction = config.build("prediction", sigma_data=path.sigma_data)
    backbone: nn.Module = config.build("backbone", **shapes)
    with config.blame("prediction"):
        return Denoiser(backbone, path, prediction)


def weight(config: Config, path: Path):
    """The weight of the loss by level."""
    return config.build("weight", sigma_data=path.sigma_data)


def grid(config: Config, path: Path) -> Level:
    """The levels that a solver walks down."""
    spacing = config.build("spacing")
    with config.blame("spacing"):
        return spacing.grid(path)
