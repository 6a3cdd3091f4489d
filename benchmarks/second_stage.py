"""What a second stage has learned of scenes: its loss beside the best Gaussians', and what the judge reads.

python -m benchmarks.second_stage FILE [--latents 10000] [--images 2048] [--prompts 200] [--cfg 1 4 7.5] [--steps 30]

The two Gaussians know the mean and the variances, or the whole covariance, of the latents of so many training scenes,
and are the best flows there are for normal data (by Bayes' rule, in closed form). The losses are those of training's
validation: the same scenes, noise and levels for all three. Prompts are captions of unseen scenes, by number of
objects, and of combinations that no training scene has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import ldm
from ldm import assemble
from ldm.metrics.alignment import prompts, verdicts
from ldm.metrics.scenes import tally
from ldm.training.latent_diffusion import LatentDiffusionStage, build

CONFIG = Path(__file__).parent.parent / "configs/ldm/scenes.yaml"
BATCH = 100
KINDS = {"one object": (1, "validation"), "two objects": (2, "validation"), "three objects": (3, "validation")}
KINDS["combinations never seen"] = (None, "held_out")  # type: ignore[assignment]


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
def latents(stage: LatentDiffusionStage, count: int) -> Tensor:
    """(N, D) of the first training scenes."""
    asks = [(i, i, 0) for i in range(count)]
    batches = (stage.data.batch(asks[k : k + BATCH], stage.seed) for k in range(0, count, BATCH))
    return torch.cat([stage.latents(batch).flatten(1) for batch in batches]).double()


@torch.no_grad()
def loss(stage: LatentDiffusionStage) -> Tensor:
    """(N,) over training's levels."""
    batches = (stage.fetched(stage.by_level.data, asks) for asks in stage.by_level.batches)
    return torch.cat([stage.by_level.losses(stage, batch)["loss"].double() for batch in batches])


def compare(file: Path, count: int, images: int) -> None:
    """A line for the model and each Gaussian, with the standard error of the difference."""
    overrides = [f"autoencoder={file}", f"trainer.validate_images={images}"]
    config, opened = assemble.load(CONFIG, overrides, assemble.DiffusionSchema)
    stage = build(config, opened, init_from=str(file)).eval()
    found = loss(stage)
    print(f"loss of the model: {found.mean():.4f} on {len(found)} unseen scenes")
    for name, gaussian in gaussians(latents(stage, count)).items():
        stage.denoiser.backbone = gaussian.float()
        best = loss(stage)
        error = (best - found).std() / len(found) ** 0.5
        below = 1 - found.mean() / best.mean()
        print(f"  {name}: {best.mean():.4f}; the model is {below:.1%} below, +- {error / best.mean():.1%}", flush=True)


def judge(file: Path, count: int, cfgs: list[float], steps: int) -> None:
    """A line for each kind of prompt and each cfg: the shares that are right, whole pictures last."""
    pipe = ldm.load(file)
    for kind, (objects, split) in KINDS.items():
        texts = prompts(count, objects, split)
        for cfg in cfgs:
            start = time.perf_counter()
            made = pipe(texts, cfg=cfg, steps=steps, batch_size=50)
            seconds = (time.perf_counter() - start) / count
            right = tally(verdicts(made, texts))
            shares = ", ".join(f"{name} {a / b:.1%}" for name, (a, b) in right.items() if b)
            print(f"{kind}, cfg {cfg:g} ({count} prompts, {seconds:.2f} s each): {shares}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--latents", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 4.0, 7.5])
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.images:
        compare(arguments.file, arguments.latents, arguments.images)
    if arguments.prompts:
        judge(arguments.file, arguments.prompts, arguments.cfg, arguments.steps)


if __name__ == "__main__":
    main()
