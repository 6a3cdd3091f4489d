"""Whether a picture shows what was said of it: the judge's reading against claims, by attribute, relation and whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.checkpoint import pretrained
from ldm.data.scenes.description import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Table
from ldm.data.scenes.relations import FOCAL, MARGIN, RELATIONS, SLANT, project, relations, view
from ldm.models.judge import Reading

NAMES = {"shape": SHAPES, "colour": COLOURS, "material": MATERIALS, "size": SIZES}
CERTAIN = 0.5  # the least score of an object that is there
TOLERANCE = 0.75  # of the margins that a relation had to have to be described
Relation = tuple[int, str, int]


@dataclass(frozen=True)
class Described:
    """What is said of one object; None for what is left out."""

    shape: str | None = None
    colour: str | None = None
    material: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What is said of a picture: its objects, and which of them stand how to each other."""

    objects: tuple[Described, ...]
    relations: frozenset[Relation] = frozenset()
    alone: bool = True  # nothing else is on the table

    @classmethod
    def of(cls, scene: Scene) -> Claim:
        """All that is true of a scene."""
        objects = (Described(o.shape, o.colour, o.material, o.size) for o in scene.objects)
        return cls(tuple(objects), frozenset(relations(scene)))


@dataclass(frozen=True)
class Seen:
    """One object as the judge sees it: its names, its place as the camera looks, its centre in the picture."""

    shape: str
    colour: str
    material: str
    size: str
    place: tuple[float, float, float]  # to the right, away, up
    centre: tuple[float, float]
    score: float

    def __str__(self) -> str:
        across, down = self.centre
        return f"{self.size} {self.material} {self.colour} {self.shape} at {across:.0%}, {down:.0%} ({self.score:.0%})"


@dataclass(frozen=True)
class Verdict:
    """Which parts of a claim a picture fulfils."""

    count: bool
    attributes: tuple[tuple[str, str, bool], ...]  # (attribute, what was said, whether it is seen)
    relations: tuple[tuple[str, bool], ...]

    @property
    def whole(self) -> bool:
        """Whether all of it is seen."""
        return self.count and all(right for _, _, right in self.attributes) and all(right for _, right in self.relations)

    @property
    def right(self) -> int:
        """How many of its parts are seen."""
        return sum(right for _, _, right in self.attributes) + sum(right for _, right in self.relations)


def objects(reading: Reading) -> list[list[Seen]]:
    """The objects of each picture, in words."""
    names = [np.array(NAMES[name])[getattr(reading, name).argmax(-1).cpu().numpy()].tolist() for name in NAMES]
    numbers = [x.double().cpu().tolist() for x in (reading.place, reading.centre, reading.score)]
    pictures = zip(*names, *numbers)
    return [
        [Seen(*row[:4], tuple(row[4]), tuple(row[5]), row[6]) for row in zip(*picture) if row[6] > CERTAIN]
        for picture in pictures
    ]


def places(table: Table) -> NDArray[np.float64]:
    """(B, 3, 3) of each object: to the right in the picture, away along the floor, up, in world units."""
    across = project(table, view(table))[0] * (table.camera[:, 2:] / FOCAL)
    azimuth = np.radians(table.camera[:, 0, None])
    return np.stack([across, table.y * np.cos(azimuth) - table.x * np.sin(azimuth), table.z], -1)


def holds(relation: str, a: Seen, b: Seen) -> bool:
    """Whether a is seen in this relation to b."""
    right, away, up = (p - q for p, q in zip(a.place, b.place))
    stacked = abs(up) > 0.5 and np.hypot(right, away) < 0.75
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
    """The verdict under the assignment of seen objects to described ones that fulfils most."""
    missing: list[Seen | None] = [None] * max(0, len(claim.objects) - len(seen))
    count = not missing and (not claim.alone or len(seen) == len(claim.objects))
    order = permutations([*seen, *missing], len(claim.objects))
    return max((_verdict(assigned, claim, count) for assigned in order), key=lambda verdict: verdict.right)


def _verdict(assigned: Sequence[Seen | None], claim: Claim, count: bool) -> Verdict:
    attributes = [
        (name, said, getattr(seen, name, None) == said)
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
    """Whether the shipped judge sees all of each claim in its picture (B, 3, H, W) in [-1, 1]."""
    return [verdict.whole for verdict in score(pretrained.judge()(pictures), claims)]


def tally(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """(right, of how many) for the count, each attribute, each relation and the whole."""
    counts = {name: [0, 0] for name in ("count", *NAMES, *RELATIONS, "whole")}
    for verdict in verdicts:
        parts = [("count", verdict.count), ("whole", verdict.whole), *verdict.relations]
        for name, right in parts + [(name, right) for name, _, right in verdict.attributes]:
            counts[name][0] += right
            counts[name][1] += 1
    return {name: (right, total) for name, (right, total) in counts.items()}


def swaps(claim: Claim) -> Iterator[tuple[str, Claim]]:
    """Every false claim that differs from a scene's true one in one attribute, or states one relation, falsely."""
    for i, described in enumerate(claim.objects):
        for name, values in NAMES.items():
            for value in set(values) - {getattr(described, name)}:
                others = (*claim.objects[:i], replace(described, **{name: value}), *claim.objects[i + 1 :])
                yield name, replace(claim, objects=others)
    for i, j in permutations(range(len(claim.objects)), 2):
        for relation in RELATIONS:
            if (i, relation, j) not in claim.relations:
                yield relation, replace(claim, relations=frozenset({(i, relation, j)}))
