"""The demo's work: points on a swiss roll, a training loop of ten lines, four solvers, one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ldm import assemble
from ldm.config import parts
from ldm.config.schema import Config
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.path import Level
from ldm.diffusion.sampler import Sampler
from ldm.draws import draw

POINTS = 6000
SOLVERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m")
INK, PAPER = (27, 58, 107), (255, 255, 255)
PANEL, MARGIN, EXTENT = 260, 34, 2.7  # pixels, pixels, and half the width of the plane that a panel shows


class Panel(NamedTuple):
    """Points (N, 2) and what stands above them."""

    title: str
    points: Tensor


def roll(u: Tensor) -> Tensor:
    """Uniform numbers (B, 2) to points (B, 2) of unit variance on a slightly thick spiral."""
    angle = 1.5 * math.pi * (1 + 2 * u[:, :1])  # (B, 1)
    thickness = 0.3 * torch.special.ndtri(u[:, 1:].clamp(1e-6, 1 - 1e-6))  # (B, 1)
    return ((angle + thickness) * torch.cat([angle.cos(), angle.sin()], 1) / 6.8).float()


def learn(config: Config) -> Denoiser:
    """Fit the denoiser: sample `number` is the same point, time and noise whatever the batch."""
    torch.set_num_threads(1)  # a network this small is slower on two
    torch.manual_seed(config["seed"])  # the initial weights
    denoiser = assemble.denoiser(config, in_channels=2)
    assemble.grid(config, denoiser.path)  # a grid that cannot be made is found before training
    weight, time = assemble.weight(config, denoiser.path), config.build("draw")
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
    for numbers in tqdm(
        _batches(config["steps"], config["batch_size"]), total=config["steps"], desc="learning", mininterval=0.5
    ):
        u, noise = draw(config["seed"], numbers, 3, (2,))
        level = time(denoiser.path, u[:, 0])
        loss = (weight(denoiser.prediction, level) * denoiser.loss(roll(u[:, 1:]), level, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser


def _batches(steps: int, size: int) -> Iterator[range]:
    return (range(step * size, (step + 1) * size) for step in range(steps))


@torch.no_grad()
def forward_process(denoiser: Denoiser, seed: int) -> list[Panel]:
    """The data on their way to noise."""
    u, noise = draw(seed + 1, range(POINTS), 2, (2,))
    panels = []
    for t in (0.0, 0.1, 0.3, 1.0):
        level = denoiser.path.level(torch.tensor([t], dtype=torch.float64)) if t > 0 else denoiser.path.data()
        row = level.rows()[0]
        x = row.alpha * roll(u) + row.sigma * noise
        panels.append(Panel(f"t = {t:g}", x / math.hypot(row.alpha, row.sigma)))
    return panels


@torch.no_grad()
def samples(denoiser: Denoiser, grid: Level, seed: int) -> list[Panel]:
    """The same noise through each solver, with its distance to fresh points of the roll."""
    truth = roll(draw(seed + 2, range(POINTS), 2, ())[0])
    panels = []
    for name in tqdm(SOLVERS, desc="sampling"):
        generator = torch.Generator().manual_seed(seed)

        def noise(generator=generator):
            return torch.randn(POINTS, 2, generator=generator)

        sampler = Sampler(Guidance(), parts.find("solver", name), grid)
        points = sampler(denoiser, denoiser.path.prior(noise()), noise)
        distance = energy_distance(points, truth)
        panels.append(Panel(f"{name}, {len(grid.t) - 1} steps, off by {distance:.5f}", points))
    return panels


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely & Rizzo 2013): 0 for equal distributions."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


def write(config: Config, file: Path) -> None:
    """The whole demo."""
    draw_picture(learn(config), config, file)


def draw_picture(denoiser: Denoiser, config: Config, file: Path) -> list[Panel]:
    """Two rows: the forward process, and what the solvers made."""
    rows = [forward_process(denoiser, config["seed"])]
    rows.append(samples(denoiser, assemble.grid(config, denoiser.path), config["seed"]))
    picture = Image.new("RGB", (4 * PANEL, 2 * (PANEL + MARGIN)), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            left, top = x * PANEL, y * (PANEL + MARGIN)
            picture.paste(_dots(panel.points), (left, top + MARGIN))
            pen.text((left + PANEL // 2, top + MARGIN // 2), panel.title, INK, font, anchor="mm")
    picture.save(file)
    return rows[1]


def _dots(points: Tensor) -> Image.Image:
    """Points as ink on paper, drawn at three times the size and shrunk."""
    size = 3 * PANEL
    cells = ((points / EXTENT * 0.5 + 0.5) * size).long().numpy()
    cells = cells[((cells >= 1) & (cells < size - 1)).all(1)]
    ink = np.zeros((size, size))
    for dx, dy in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
        np.add.at(ink, (size - 1 - cells[:, 1] + dy, cells[:, 0] + dx), 1.0)
    strength = (1 - np.exp(-0.7 * ink))[..., None]
    image = np.array(PAPER) * (1 - strength) + np.array(INK) * strength
    return Image.fromarray(image.astype(np.uint8)).resize((PANEL, PANEL), Image.Resampling.LANCZOS)
