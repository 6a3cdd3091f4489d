"""Whether pictures show what is said of them: the judge's readings against claims, by attribute, relation and whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import hypot

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.scenes import pretrained
from ldm.scenes.description import Scene, Table
from ldm.scenes.judge import Reading
from ldm.scenes.relations import FOCAL, MARGIN, RELATIONS, SLANT, project, view
from ldm.scenes.statements import NAMES, Claim

CERTAIN = 0.5  # the least score of an object that is there
TOLERANCE = 0.8  # of the margins that relations keep in scenes
BESIDE, ABOVE = 0.75, 0.5  # stacked objects are less than this apart along the floor, and more than that in height


@dataclass(frozen=True)
class Seen:
    """One object as the judge sees it."""

    shape: str
    colour: str
    material: str
    size: str
    place: tuple[float, float, float]  # to the right, away, up, in world units
    centre: tuple[float, float]  # in the picture, 0 to 1 from its left and top
    score: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of a claim a picture fulfils."""

    count: bool
    attributes: tuple[tuple[str, bool], ...]  # one for each that was said of an object
    relations: tuple[tuple[str, bool], ...]

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """All of them by name."""
        return (("count", self.count), *self.attributes, *self.relations)

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return all(right for _, right in self.parts)


def objects(reading: Reading) -> list[list[Seen]]:
    """What is seen in each picture, in words."""
    names = [np.array(NAMES[name])[getattr(reading, name).argmax(-1).cpu().numpy()].tolist() for name in NAMES]
    numbers = [x.double().cpu().tolist() for x in (reading.place, reading.centre, reading.score)]
    candidates = ([Seen(*row) for row in zip(*picture)] for picture in zip(*names, *numbers))
    return [[one for one in row if one.score > CERTAIN] for row in candidates]


def places(table: Table) -> NDArray[np.float64]:
    """(B, 3, 3) where the objects are as the camera looks: to the right, away along the floor, up."""
    across = project(table, view(table))[0] * (table.camera[:, 2:] / FOCAL)
    azimuth = np.radians(table.camera[:, 0, None])
    return np.stack([across, table.y * np.cos(azimuth) - table.x * np.sin(azimuth), table.z], -1)


def holds(relation: str, a: Seen, b: Seen) -> bool:
    """Whether a is seen in this relation to b."""
    right, away, up = (p - q for p, q in zip(a.place, b.place))
    stacked = abs(up) > ABOVE and hypot(right, away) < BESIDE
    if relation == "on top of":
        return stacked and up > 0
    along, across = {
        "left of": (-right, away),
        "right of": (right, away),
        "in front of": (-away, right),
        "behind": (away, right),
    }[relation]
    return not stacked and along > TOLERANCE * max(MARGIN, SLANT * abs(across))


def judged(seen: Sequence[Seen], claim: Claim) -> Verdict:
    """The verdict where described objects are taken to be those seen that make most of the claim true."""
    missing = [None] * (len(claim.objects) - len(seen))
    count = len(seen) == len(claim.objects)
    verdicts = [_verdict(row, claim, count) for row in permutations([*seen, *missing], len(claim.objects))]
    return max(verdicts, key=lambda verdict: sum(right for _, right in verdict.parts))


def _verdict(assigned: Sequence[Seen | None], claim: Claim, count: bool) -> Verdict:
    attributes = [
        (name, getattr(seen, name, None) == said)
        for seen, described in zip(assigned, claim.objects)
        for name in NAMES
        if (said := getattr(described, name)) is not None
    ]
    related = [
        (relation, a is not None and b is not None and holds(relation, a, b))
        for i, relation, j in sorted(claim.relations)
        for a, b in [(assigned[i], assigned[j])]
    ]
    return Verdict(count, tuple(attributes), tuple(related))


def score(reading: Reading, claims: Sequence[Claim | Scene]) -> list[Verdict]:
    """The verdict on each picture's claim; a scene claims all that is true of it."""
    full = (claim if isinstance(claim, Claim) else Claim.of(claim) for claim in claims)
    return [judged(seen, claim) for seen, claim in zip(objects(reading), full)]


def accepts(pictures: Tensor, claims: Sequence[Claim | Scene]) -> list[bool]:
    """Whether the shipped judge sees all of each claim in its picture, (B, 3, H, W) in [-1, 1]."""
    return [verdict.whole for verdict in score(pretrained.judge()(pictures), claims)]


def tally(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """(right, of how many) for the count, each attribute, each relation and the whole."""
    counts = {name: [0, 0] for name in ("count", *NAMES, *RELATIONS, "whole")}
    for verdict in verdicts:
        for name, right in (*verdict.parts, ("whole", verdict.whole)):
            counts[name][0] += right
            counts[name][1] += 1
    return {name: (right, total) for name, (right, total) in counts.items()}
