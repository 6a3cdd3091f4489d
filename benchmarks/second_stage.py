"""What a second stage has learned of scenes: its loss beside the best Gaussians'.

python -m benchmarks.second_stage FILE [--latents 10000] [--images 2048]

The two Gaussians know the mean and the variances, or the whole covariance, of the latents of so many training scenes,
and are the best flows there are for normal data (by Bayes' rule, in closed form). The losses are those of training's
validation: the same scenes, noise and levels for all three. What it makes of prompts, `ldm evaluate` measures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import assemble
from ldm.training.recipe import Start
from ldm.training.recipes.diffusion import DiffusionRecipe, Schema
from ldm.training.run import build

CONFIG = Path(__file__).parent.parent / "configs/ldm/scenes.yaml"
BATCH = 100


class Gaussian(nn.Module):
    """The best flow for normal latents, given their mean, an orthonormal basis and the variances along it."""

    def __init__(self, mean: Tensor, basis: Tensor | None, variances: Tensor):
        super().__init__()
        self.mean, self.basis, self.variances = mean, basis, variances

    def forward(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
        """E[noise - x0 | x] at t in thousandths."""
        s = (t.to(x) / 1000)[:, None]  # (B, 1)
        a = 1 - s
        off = x.flatten(1) - a * self.mean  # (B, D)
        off = off if self.basis is None else off @ self.basis
        off = a * self.variances / (a**2 * self.variances + s**2) * off
        x0 = (self.mean + (off if self.basis is None else off @ self.basis.T)).view_as(x)
        return (x - (a * x0.flatten(1)).view_as(x)) / s[:, :, None, None] - x0


def gaussians(z: Tensor) -> dict[str, Gaussian]:
    """Without correlations, and with all of them, from latents (N, D)."""
    mean = z.mean(0)
    variances, basis = torch.linalg.eigh(torch.cov(z.T))
    return {
        "diagonal Gaussian": Gaussian(mean, None, z.var(0)),
        "full Gaussian": Gaussian(mean, basis, variances.clamp(min=0)),
    }


@torch.no_grad()
def latents(recipe: DiffusionRecipe, count: int) -> Tensor:
    """(N, D) of the first training scenes."""
    sample_ids = [(i, i, 0) for i in range(count)]
    batches = (recipe.data.batch(sample_ids[k : k + BATCH], recipe.seed) for k in range(0, count, BATCH))
    return torch.cat([recipe.latents(batch).flatten(1) for batch in batches]).double()


@torch.no_grad()
def loss(recipe: DiffusionRecipe) -> Tensor:
    """(N,) at the levels of training."""
    found: list[Tensor] = []

    def losses(batch: dict[str, Any], part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        each = recipe.validation_losses(batch, part)
        found.append(each[0].double())
        return each

    recipe.loss_by_level.measure(losses, recipe.rank)
    return torch.cat(found)


def compare(file: Path, count: int, images: int) -> None:
    """A line for the model and each Gaussian, with the standard error of the difference."""
    overrides = [f"autoencoder={file}", f"trainer.validate_images={images}"]
    config, loaded = assemble.load(CONFIG, overrides, Schema)
    recipe: Any = build(config, loaded, Start(init_from=str(file))).recipe.eval()
    found = loss(recipe)
    print(f"loss of the model: {found.mean():.4f} on {len(found)} unseen scenes")
    for name, gaussian in gaussians(latents(recipe, count)).items():
        recipe.denoiser.backbone = gaussian.float()
        best = loss(recipe)
        error = (best - found).std() / len(found) ** 0.5
        below = 1 - found.mean() / best.mean()
        print(f"  {name}: {best.mean():.4f}; the model is {below:.1%} below, +- {error / best.mean():.1%}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--latents", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=2048)
    arguments = parser.parse_args()
    compare(arguments.file, arguments.latents, arguments.images)


if __name__ == "__main__":
    main()
