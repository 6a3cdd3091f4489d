"""Training of the judge on slightly corrupted renders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.draws import stream
from ldm.pictures import to_float
from ldm.scenes.description import Table
from ldm.scenes.drawing import draw
from ldm.scenes.judge import CELLS, SIDE, Judge, Maps, take
from ldm.scenes.judge_accuracy import blurred
from ldm.scenes.render import render
from ldm.scenes.scoring import places
from ldm.scenes.statements import NAMES

HELD_OUT = 0.25  # share of scenes; a judge that never saw a combination would reject it
BLOCK = 256  # scenes rendered at once
BATCH, RATE, DECAY = 16, 2e-3, 0.999


class Truth(NamedTuple):
    """What should be detected in a batch of scenes, three places each."""

    there: Tensor  # (B, 3) bool
    names: Tensor  # (B, 3, 4) shape, colour, material, size, as indices
    centre: Tensor  # (B, 3, 2)
    place: Tensor  # (B, 3, 3)
    mask: Tensor  # (B, 3, 32, 32) the share of each cell that shows the object


def truth(table: Table, instances: Tensor) -> Truth:
    """Targets from descriptions and instance maps (B, H, W), in which objects count from 1."""
    masks = torch.stack([instances == i for i in (1, 2, 3)], 1)  # (B, 3, H, W)
    mask = F.adaptive_avg_pool2d(masks.float(), CELLS)
    along = (torch.arange(CELLS) + 0.5) / CELLS
    area = mask.sum((2, 3)).clamp(min=1e-6)
    centre = torch.stack([(mask.sum(2) * along).sum(-1), (mask.sum(3) * along).sum(-1)], -1) / area[..., None]
    names = np.stack([getattr(table, name) for name in NAMES], -1)
    place = torch.from_numpy(places(table)).float()
    return Truth(torch.from_numpy(table.there), torch.from_numpy(names), centre, place, mask)


class Pool(NamedTuple):
    """Rendered scenes in memory."""

    table: Table
    images: Tensor  # (N, 3, 64, 64) uint8
    instances: Tensor  # (N, 64, 64) uint8: 0, or the number of the object from 1

    @classmethod
    def rendered(cls, seed: int, count: int, device: str, report: Callable[[str], None]) -> Pool:
        """Render `count` scenes of both splits."""
        rare = int(count * HELD_OUT)
        tables = [draw(seed, range(count - rare)), draw(seed, range(rare), "held_out")]
        table = Table(*(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(Table)))
        pool = cls(
            table,
            torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8),
            torch.empty(count, SIDE, SIDE, dtype=torch.uint8),
        )
        for start in range(0, count, BLOCK):
            rows = slice(start, min(start + BLOCK, count))
            for name, x in render(table[rows], SIDE, device, ("image", "mask")).items():
                (pool.images if name == "image" else pool.instances)[rows] = x.cpu()
            if start // BLOCK % 20 == 0:
                report(f"rendered {rows.stop} of {count}")
        return pool

    def batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Truth]:
        """Corrupted pictures of these scenes, and the truth."""
        images = corrupted(to_float(self.images[rows]), generator)
        return images, truth(self.table[rows.numpy()], self.instances[rows])


# ------------------------------------------------------------------------------------------------------------ the loss


def loss(maps: Maps, truth: Truth) -> Tensor:
    """The loss of all outputs, per object."""
    at = truth.centre * CELLS  # (B, 3, 2)
    corner = torch.stack(torch.meshgrid(*[torch.arange(CELLS, device=at.device)] * 2, indexing="xy"), -1)  # (32, 32, 2)
    apart = (corner + 0.5 - at[:, :, None, None]).square().sum(-1)  # (B, 3, 32, 32)
    near, owner = (torch.exp(-apart / 2) * truth.there[..., None, None]).max(1)  # (B, 32, 32) twice
    weight = near * (near > 0.3)  # the centre's cell and its neighbours
    rows = torch.arange(len(owner), device=owner.device)[:, None, None]
    error = (maps.place - truth.place[rows, owner]).abs().sum(-1)  # (B, 32, 32)
    error = error + (corner + maps.offset - at[rows, owner]).abs().sum(-1)
    for i, logits in enumerate(maps[1:5]):
        names = truth.names[rows, owner, i].clamp(min=0)  # (B, 32, 32)
        error = error + F.cross_entropy(logits.permute(0, 3, 1, 2), names, reduction="none")
    return (error * weight).sum() / weight.sum() + objectness(maps.score, near, truth) + mask_loss(maps, truth)


def objectness(score: Tensor, near: Tensor, truth: Truth) -> Tensor:
    """CenterNet's focal loss (eq. 1): false positives near a centre weigh less."""
    centre = torch.zeros_like(score).flatten(1)  # (B, 1024)
    centre = centre.scatter_reduce(1, cell(truth), truth.there.float(), "amax")
    score, near = score.flatten(1), near.flatten(1)
    found = score.sigmoid().neg().add(1).square() * F.logsigmoid(score) * centre
    absent = score.sigmoid().square() * F.logsigmoid(-score) * (1 - near) ** 4 * (1 - centre)
    return -(found + absent).sum() / truth.there.sum()


def mask_loss(maps: Maps, truth: Truth) -> Tensor:
    """Cross-entropy of the masks of the true objects."""
    logits = maps.mask(take(maps.query, cell(truth)))  # (B, 3, 32, 32)
    error = F.binary_cross_entropy_with_logits(logits, truth.mask, reduction="none").sum((2, 3))  # (B, 3)
    return (error * truth.there).sum() / truth.there.sum() / 50  # about the cells of one object


def cell(truth: Truth) -> Tensor:
    """(B, 3) the cells of the centres, counted row by row."""
    column, row = (truth.centre * CELLS).long().clamp(0, CELLS - 1).unbind(-1)
    return row * CELLS + column


# -------------------------------------------------------------------------------------------------------- the training


def corrupted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with the flaws of decoders and cameras: contrast, brightness, blotches, blur and noise."""
    u = torch.rand(6, len(x), 1, 1, 1, generator=generator)
    x = x * (0.85 + 0.25 * u[0]) + 0.16 * (u[1] - 0.5)  # contrast, brightness
    blotches = torch.randn(len(x), 3, 8, 8, generator=generator) * 0.08 * u[2]
    x = x + F.interpolate(blotches, x.shape[2:], mode="bilinear")
    soft = blurred(x, 0.4 + 0.8 * float(u[3, 0]))
    x = torch.lerp(x, soft, (2 * u[4] - 0.6).clamp(0, 1))
    return (x + torch.randn(x.shape, generator=generator) * 0.12 * u[5] ** 2).clamp(-1, 1)


def train(*, steps: int, pictures: int, seed: int, device: str = "cpu", report: Callable[[str], None] = print) -> Judge:
    """A trained judge; its weights are a moving average."""
    generator = torch.Generator().manual_seed(stream(seed, "judge"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "judge weights"))
        judge = Judge().to(device)
    average = copy.deepcopy(judge).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    pool = Pool.rendered(seed, pictures, device, report)
    for step in range(1, steps + 1):
        images, answers = pool.batch(torch.randint(pictures, (BATCH,), generator=generator), generator)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            maps = judge.maps(images.to(device))
        value = loss(maps, Truth(*(x.to(device) for x in answers)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for mean, now in zip(average.parameters(), judge.parameters()):
            mean.lerp_(now, max(1 - DECAY, 9 / (10 + step)))  # the first weights soon lose their influence
        if step % 100 == 0:
            report(f"step {step} of {steps}: loss {value.item():.3f}")
    return average
