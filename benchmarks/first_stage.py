"""What a first stage that was trained on scenes reaches on scenes that it never saw; draws its curve and a grid.

python -m benchmarks.first_stage RUN [RUN ...] [--images 1000] [--out docs/first_stage.png]

Beside each mean stands the standard error. `bicubic` is the picture scaled down by the stage's factor and up again,
antialiased. The judge reads pictures and their reconstructions against the scenes' whole truth.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ldm import checkpoint, pictures
from ldm.checkpoint.networks import autoencoder_of
from ldm.metrics.feature_metrics import Moments, frechet_distance
from ldm.metrics.images import gradient_energy, measures
from ldm.models.autoencoder import Autoencoder
from ldm.scenes import draw, render
from ldm.scenes.pretrained import judge
from ldm.scenes.scoring import score_all, tally

BATCH, SIZE, SEED, ROWS = 50, 64, 1, 4
WIDTH, HEIGHT, LEFT, DOWN = 420, 260, 44, 24  # of a plot, in pixels, and its margins


class Measured(NamedTuple):
    """Of one set of pictures against the true ones."""

    values: dict[str, Tensor]  # (N,) each
    read: dict[str, float]  # the share that the judge reads right
    frechet: float


def first_stage(run: Path) -> Autoencoder:
    """The autoencoder of a run."""
    loaded = checkpoint.open(run / "model.safetensors")
    return autoencoder_of(loaded.config["autoencoder"], loaded.state)


def reconstructed(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) through the bottleneck and back."""
    return torch.cat([autoencoder(some)[0] for some in x.split(BATCH)]).clamp(-1, 1)


def bicubic(x: Tensor, factor: int) -> Tensor:
    """Pictures made as small as latents are, and large again."""
    small = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return F.interpolate(small, x.shape[2:], mode="bicubic").clamp(-1, 1)


def measured(x: Tensor, y: Tensor, scenes: list) -> Measured:
    """Everything about y, which should be x."""
    values = measures(x, y) | {"gradient energy": gradient_energy(y) / gradient_energy(x)}
    scores, moments = [], []
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        scores += score_all(judge()(y[part]), scenes[part])
        moments.append([judge().pooled(each[part]) for each in (x, y)])
    right = {name: a / b for name, (a, b) in tally(scores).items() if b}
    true, made = (Moments.of(torch.cat(side)) for side in zip(*moments))
    return Measured(values, right, frechet_distance(true, made))


def show(name: str, found: Measured, originals: Measured) -> None:
    """A line for each measure."""
    print(f"\n{name}")
    for measure, values in found.values.items():
        values = values[values.isfinite()]
        if len(values):
            print(f"  {measure:16} {values.mean():8.3f} +- {values.std() / len(values) ** 0.5:.3f}")
    print(f"  {'frechet':16} {found.frechet:8.4f}")
    parts = (f"{part} {share / originals.read[part]:.3f}" for part, share in found.read.items())
    print("  read, as a part of what is read of the originals: " + ", ".join(parts))


# ------------------------------------------------------------------------------------------------------ the picture


def curve(runs: list[Path]) -> Image.Image:
    """PSNR at validation by images seen, a line for each run."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, colours = ImageDraw.Draw(canvas), ("#1b3a6b", "#c0392b", "#27ae60")
    lines = []
    for run in runs:
        with (run / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/psnr")]
        lines.append([(float(row["images_seen"]) / 1000, float(row["val/psnr"])) for row in rows])
    most = max(x for line in lines for x, _ in line)
    low, high = (int(f(y for line in lines for _, y in line)) + up for f, up in ((min, 0), (max, 1)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / most * (WIDTH - LEFT - 12)
        return across, HEIGHT - DOWN - (y - low) / (high - low) * (HEIGHT - DOWN - 12)

    for y in range(low, high + 1, 2):
        pen.line([place(0, y), place(most, y)], "#dddddd")
        pen.text((8, place(0, y)[1] - 6), f"{y} dB", "black")
    pen.text((WIDTH - 170, HEIGHT - 16), f"thousand images (to {most:.0f})", "black")
    for i, (run, line) in enumerate(zip(runs, lines)):
        pen.line([place(*point) for point in line], colours[i % 3], 2)
        pen.text((WIDTH - 110, HEIGHT - DOWN - 60 + 14 * i), run.name, colours[i % 3])
    return canvas


def grid(x: Tensor, made: list[Tensor]) -> Image.Image:
    """The first pictures, each above what the runs make of it, twice their size."""
    rows = torch.stack([x[:ROWS], *(y[:ROWS] for y in made)]).flatten(0, 1)
    small = pictures.grid(pictures.to_pil(rows), columns=ROWS)
    return small.resize((2 * small.width, 2 * small.height), Image.Resampling.NEAREST)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--split", default="validation", choices=("validation", "held_out"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with torch.inference_mode():
        table = draw(SEED, range(arguments.images), arguments.split)
        scenes, parts = table.scenes(), [table[start : start + BATCH] for start in range(0, len(table), BATCH)]
        x = pictures.to_float(torch.cat([render(part, SIZE)["image"] for part in parts]))
        originals, made = measured(x, x, scenes), []
        stages = {run: first_stage(run) for run in arguments.runs}
        factor = next(iter(stages.values())).factor
        show(f"bicubic / {factor}", measured(x, bicubic(x, factor), scenes), originals)
        for run, autoencoder in stages.items():
            made.append(reconstructed(autoencoder, x))
            show(str(run), measured(x, made[-1], scenes), originals)
    if arguments.out:
        left, right = curve(arguments.runs), grid(x, made)
        sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
        sheet.paste(left, (0, (sheet.height - left.height) // 2))
        sheet.paste(right, (left.width, 0))
        sheet.save(arguments.out)
        print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    main()
