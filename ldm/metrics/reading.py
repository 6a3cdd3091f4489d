"""How well a judge reads true renders: clean, blurred, noised and larger ones, in combinations it may not have met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.scenes.drawing import draw
from ldm.data.scenes.render import render
from ldm.draws import stream
from ldm.metrics.claims import Claim, swaps
from ldm.metrics.scenes import CERTAIN, Verdict, judged, objects, score, tally
from ldm.models.judge import CELLS, SIDE, Judge, Reading
from ldm.pictures import to_float

BATCH = 100
COUNTS = ("one object", "two objects", "three objects")


class Test(NamedTuple):
    """Renders of a split at a size, spoilt in some way."""

    split: str = "validation"
    spoilt: str = "clean"
    size: int = SIDE

    def __str__(self) -> str:
        return " ".join(
            [self.split, *[self.spoilt] * (self.spoilt != "clean"), *[f"{self.size} px"] * (self.size != SIDE)]
        )


TESTS = [Test(split, spoilt) for split in ("validation", "held_out") for spoilt in ("clean", "blurred", "noised")]
TESTS += [Test(size=128), Test(size=256)]


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


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    "blurred": lambda x: blurred(x, 0.7 * x.shape[-1] / SIDE),
    "noised": noised,
}


def measure(judge: Judge, test: Test, count: int, seed: int) -> dict[str, float]:
    """The share of so many pictures that is read right, part by part, and of false claims that are taken for true."""
    scenes = draw(seed, range(count), test.split).scenes()
    verdicts: list[Verdict] = []
    overlaps, fooled = [], []
    for start in range(0, count, BATCH):
        some = scenes[start : start + BATCH]
        made = render(some, test.size, want=("image", "mask"))
        with torch.no_grad():
            reading = judge(SPOIL[test.spoilt](to_float(made["image"])))
        verdicts += score(reading, some)
        overlaps.append(overlap(reading, made["mask"]))
        for seen, scene in zip(objects(reading), some):
            fooled += [judged(seen, claim).whole for _, claim in swaps(Claim.of(scene))]
    right = {name: a / b for name, (a, b) in tally(verdicts).items() if b}
    for i, name in enumerate(COUNTS):
        whole = [verdict.whole for verdict, scene in zip(verdicts, scenes) if len(scene.objects) == i + 1]
        right[f"whole, {name}"] = sum(whole) / len(whole)
    return right | {"mask overlap": torch.cat(overlaps).mean().item(), "false claims taken": sum(fooled) / len(fooled)}


def overlap(reading: Reading, instances: Tensor) -> Tensor:
    """Intersection over union of each true object's mask with the best of those seen, from instances (B, H, W)."""
    there = torch.stack([instances == i for i in (1, 2, 3)], 1).float()  # (B, 3, H, W)
    there = F.adaptive_avg_pool2d(there, CELLS).gt(0.5).flatten(2).float()  # (B, 3, 1024)
    seen = (reading.mask > 0.5).flatten(2) & (reading.score > CERTAIN)[..., None]  # (B, K, 1024)
    both = there @ seen.float().mT  # (B, 3, K)
    either = there.sum(2)[:, :, None] + seen.sum(2)[:, None] - both
    return (both / either.clamp(min=1)).amax(2)[there.sum(2) > 0]


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Percentages, a row for each part and a column for each test."""
    names = list(next(iter(columns.values())))
    lines = ["".join([" " * 24, *(f"{title:>22}" for title in columns)])]
    lines += [f"{name:24}" + "".join(f"{100 * column[name]:22.1f}" for column in columns.values()) for name in names]
    return "\n".join(lines)
