"""The judge's accuracy on renders: clean, blurred, noisy and larger, and with combinations held out of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.draws import stream
from ldm.pictures import to_float
from ldm.scenes.description import Table
from ldm.scenes.drawing import draw
from ldm.scenes.judge import CELLS, SIDE, Detections, Judge
from ldm.scenes.render import render
from ldm.scenes.scoring import THRESHOLD, objects, score, score_all, tally
from ldm.scenes.statements import Statement, swaps

BATCH, EVERY = 100, 7  # pictures at a time; every 7th false statement is tried
COUNTS = ("one object", "two objects", "three objects")


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pictures convolved with a Gaussian; sigma in pixels."""
    weight = torch.exp(-torch.arange(-4.0, 5.0).square() / (2 * sigma**2))
    weight = (weight / weight.sum()).repeat(3, 1, 1, 1)  # (3, 1, 1, 9)
    x = F.conv2d(F.pad(x, (4, 4, 0, 0), "replicate"), weight, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 4, 4), "replicate"), weight.transpose(2, 3), groups=3)


def noisy(x: Tensor, sigma: float = 0.06) -> Tensor:
    """Pictures with Gaussian noise of 0.03 of their range."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(stream(0, "noised")))
    return (x + sigma * noise).clamp(-1, 1)


Corruption = Callable[[Tensor], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "clean": lambda x: x,
    "blurred": lambda x: blurred(x, 0.7),
    "noised": noisy,
}


def accuracy(judge: Judge, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on `count` scenes of two splits under each corruption, and on an eighth as many larger renders."""
    found: dict[str, dict[str, float]] = {}
    for split in ("validation", "held_out"):
        scenes = draw(seed, range(count), split)
        made = pictures(scenes, SIDE)
        found |= {f"{split}, {name}": measure(judge, scenes, *made, CORRUPTIONS[name]) for name in CORRUPTIONS}
    few = draw(seed, range(count, count + -(-count // 8)), "validation")
    return found | {f"{size} px": measure(judge, few, *pictures(few, size)) for size in (128, 256)}


def pictures(scenes: Table, size: int) -> tuple[Tensor, Tensor]:
    """Renders (B, 3, H, W) uint8, and the object that each pixel shows (B, H, W)."""
    made = render(scenes, size, want=("image", "mask"))
    return made["image"], made["mask"]


def measure(
    judge: Judge, table: Table, images: Tensor, instances: Tensor, corrupt: Corruption = lambda x: x
) -> dict[str, float]:
    """Shares that are correct, part by part; the masks' overlap; the share of false statements that are accepted."""
    scenes = table.scenes()
    with torch.no_grad():
        batches = [judge(corrupt(to_float(part))) for part in images.split(BATCH)]
    detections = Detections(*(torch.cat(each) for each in zip(*batches)))
    scores = score_all(detections, scenes)
    shares = {name: correct / total for name, (correct, total) in tally(scores).items() if total}
    for count, name in enumerate(COUNTS, 1):
        correct = [score.correct for score, scene in zip(scores, scenes) if len(scene.objects) == count]
        shares[f"whole, {name}"] = sum(correct) / max(len(correct), 1)
    accepted = [
        score(seen, statement).correct
        for row, (seen, scene) in enumerate(zip(objects(detections), scenes))
        for _, statement in islice(swaps(Statement.of(scene)), row % EVERY, None, EVERY)
    ]
    shares["mask overlap"] = overlap(detections, instances).mean().item()
    return shares | {"false statements accepted": sum(accepted) / len(accepted)}


def overlap(detections: Detections, instances: Tensor) -> Tensor:
    """Intersection over union of each true object's mask with the best detected one, from instances (B, H, W)."""
    there = torch.stack([instances == i for i in (1, 2, 3)], 1).float()  # (B, 3, H, W)
    there = F.adaptive_avg_pool2d(there, CELLS).gt(0.5).flatten(2).float()  # (B, 3, 1024)
    seen = (detections.mask > 0.5).flatten(2) & (detections.score > THRESHOLD)[..., None]  # (B, K, 1024)
    both = there @ seen.float().mT  # (B, 3, K)
    either = there.sum(2)[:, :, None] + seen.sum(2)[:, None] - both
    return (both / either.clamp(min=1)).amax(2)[there.sum(2) > 0]


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Percentages: a row for each part, a column for each trial."""
    names = list(next(iter(columns.values())))
    lines = ["".join([" " * 26, *(f"{title:>22}" for title in columns)])]
    lines += [f"{name:26}" + "".join(f"{100 * column[name]:22.1f}" for column in columns.values()) for name in names]
    return "\n".join(lines)
