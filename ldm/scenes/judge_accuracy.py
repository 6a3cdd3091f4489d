"""How well a judge reads true renders: clean, blurred, noised and larger ones, in combinations it may not have met."""

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
from ldm.scenes.judge import CELLS, SIDE, Judge, Reading
from ldm.scenes.render import render
from ldm.scenes.scoring import CERTAIN, judged, objects, score, tally
from ldm.scenes.statements import Claim, swaps

BATCH, EVERY = 100, 7  # pictures read at once; one in so many false claims is tried
COUNTS = ("one object", "two objects", "three objects")


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pictures convolved with a Gaussian of so many pixels."""
    weight = torch.exp(-torch.arange(-4.0, 5.0).square() / (2 * sigma**2))
    weight = (weight / weight.sum()).repeat(3, 1, 1, 1)  # (3, 1, 1, 9)
    x = F.conv2d(F.pad(x, (4, 4, 0, 0), "replicate"), weight, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 4, 4), "replicate"), weight.transpose(2, 3), groups=3)


def noised(x: Tensor, sigma: float = 0.06) -> Tensor:
    """Pictures with noise of 0.03 of their range."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(stream(0, "noised")))
    return (x + sigma * noise).clamp(-1, 1)


Spoil = Callable[[Tensor], Tensor]
SPOIL: dict[str, Spoil] = {
    "clean": lambda x: x,
    "blurred": lambda x: blurred(x, 0.7),
    "noised": noised,
}


def measures(judge: Judge, count: int, seed: int) -> dict[str, dict[str, float]]:
    """What is read of so many scenes of two splits, in three ways, and of an eighth as many that are larger."""
    found: dict[str, dict[str, float]] = {}
    for split in ("validation", "held_out"):
        scenes = draw(seed, range(count), split)
        made = pictures(scenes, SIDE)
        found |= {f"{split}, {way}": measure(judge, scenes, *made, SPOIL[way]) for way in SPOIL}
    few = draw(seed, range(count, count + -(-count // 8)), "validation")
    return found | {f"{size} px": measure(judge, few, *pictures(few, size)) for size in (128, 256)}


def pictures(scenes: Table, size: int) -> tuple[Tensor, Tensor]:
    """True renders (B, 3, H, W) uint8, and which object each pixel shows (B, H, W)."""
    made = render(scenes, size, want=("image", "mask"))
    return made["image"], made["mask"]


def measure(
    judge: Judge, table: Table, images: Tensor, instances: Tensor, spoil: Spoil = lambda x: x
) -> dict[str, float]:
    """The share that is read right, part by part, the masks' overlap, and the share of false claims taken for true."""
    scenes, readings = table.scenes(), []
    with torch.no_grad():
        readings = [judge(spoil(to_float(some))) for some in images.split(BATCH)]
    reading = Reading(*(torch.cat(each) for each in zip(*readings)))
    verdicts = score(reading, scenes)
    right = {name: a / b for name, (a, b) in tally(verdicts).items() if b}
    for count, name in enumerate(COUNTS, 1):
        whole = [verdict.whole for verdict, scene in zip(verdicts, scenes) if len(scene.objects) == count]
        right[f"whole, {name}"] = sum(whole) / max(len(whole), 1)
    fooled = [
        judged(seen, claim).whole
        for row, (seen, scene) in enumerate(zip(objects(reading), scenes))
        for _, claim in islice(swaps(Claim.of(scene)), row % EVERY, None, EVERY)
    ]
    overlaps = overlap(reading, instances).mean().item()
    return right | {"mask overlap": overlaps, "false claims taken": sum(fooled) / len(fooled)}


def overlap(reading: Reading, instances: Tensor) -> Tensor:
    """Intersection over union of each true object's mask with the best of those seen, from instances (B, H, W)."""
    there = torch.stack([instances == i for i in (1, 2, 3)], 1).float()  # (B, 3, H, W)
    there = F.adaptive_avg_pool2d(there, CELLS).gt(0.5).flatten(2).float()  # (B, 3, 1024)
    seen = (reading.mask > 0.5).flatten(2) & (reading.score > CERTAIN)[..., None]  # (B, K, 1024)
    both = there @ seen.float().mT  # (B, 3, K)
    either = there.sum(2)[:, :, None] + seen.sum(2)[:, None] - both
    return (both / either.clamp(min=1)).amax(2)[there.sum(2) > 0]


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Percentages, a row for each part and a column for each trial."""
    names = list(next(iter(columns.values())))
    lines = ["".join([" " * 24, *(f"{title:>22}" for title in columns)])]
    lines += [f"{name:24}" + "".join(f"{100 * column[name]:22.1f}" for column in columns.values()) for name in names]
    return "\n".join(lines)
