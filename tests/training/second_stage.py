"""A tiny second stage of scenes: the file of a first stage, a cache of it, and the configuration."""

from __future__ import annotations

from pathlib import Path

from ldm import assemble, checkpoint
from ldm.cli import main
from ldm.models.autoencoder import kl
from ldm.training.loop import Loop
from ldm.training.recipe import Start
from ldm.training.recipes.diffusion import DiffusionRecipe, Schema
from ldm.training.run import build
from tests.models.first_stages import fill
from tests.training import killing

NUMBERS = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "mid_attention": False}

TWO = """
seed: 3
size: 16
autoencoder: {folder}/first.safetensors
path: {{type: flow}}
prediction: {{type: flow}}
backbone: {{type: unet, channels: 32, multipliers: [1, 2], blocks: 1, attend: [2], heads: 4}}
conditioner: {{type: joint_text, width: 32, layers: 2, heads: 2, length: 32, vocabulary: 600, drop: 0.3}}
guidance: {{cfg: 2}}
spacing: {{type: trailing, steps: 3}}
solver: {{type: euler}}
draw: {{type: logit_normal}}
weight: {{type: constant}}
optimizer: {{type: adamw, lr: 1e-3}}
schedule: {{type: cosine, warmup: 2}}
ema: {{decay: 0.9}}
data: {{type: scenes, resolution: 16, batch_size: 8, size: 40, workers: 0}}
trainer: {{steps: 10, log_every: 1, save_every: 5, validate_every: 5, validate_images: 16}}
"""


# sharded tensors cost seconds in a first step, each of them
FEW_TENSORS = ["backbone.multipliers=[1]", "backbone.attend=[1]", "conditioner.layers=1"]


def first_stage(file: Path, seed: int = 0) -> None:
    """The file of a first stage of a factor of 2, with random weights."""
    autoencoder = fill(kl(**NUMBERS), seed)  # type: ignore[arg-type]
    autoencoder.set_statistics(0.02, 1.48)  # about the latents of scenes
    node = {"type": "kl", "latent": 4, "attend": [], "stem": 1, "per_channel": False, "checkpointing": False, **NUMBERS}
    config = {"format": 1, "autoencoder": node, "fingerprint": autoencoder.fingerprint()}
    checkpoint.save(file, config, {f"autoencoder.{name}": x for name, x in autoencoder.state_dict().items()})


def command(run: Path, *overrides: str) -> list[str]:
    """The command that begins a run, and goes on with it; the first stage's file is made with the first."""
    if not (run.parent / "first.safetensors").exists():
        first_stage(run.parent / "first.safetensors")
    return killing.command(run, *overrides, config=TWO.format(folder=run.parent), name="train-ldm")


def cached(folder: Path, *overrides: str) -> list[str]:
    """The overrides that train on a cache, which is made here."""
    argv = command(folder / "unused", *overrides)
    config = argv[argv.index("--config") + 1]
    assert main(["cache", "--config", config, "--out", str(folder / "cache"), "--device", "cpu", *overrides]) == 0
    return [*overrides, f"data={{type: latents, root: {folder / 'cache'}, batch_size: 8, workers: 0}}"]


def loop_of(folder: Path, *overrides: str) -> Loop:
    """A loop that Lightning has not seen."""
    argv = command(folder / "unused")
    config, loaded = assemble.load(argv[argv.index("--config") + 1], overrides, Schema)
    return build(config, loaded, Start())


def recipe_of(folder: Path, *overrides: str) -> DiffusionRecipe:
    """Its recipe."""
    recipe = loop_of(folder, *overrides).recipe
    assert isinstance(recipe, DiffusionRecipe)
    return recipe
