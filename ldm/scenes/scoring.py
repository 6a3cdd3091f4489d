"""Scores: which parts of a statement the judge finds in a picture."""

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
from ldm.scenes.judge import Detections
from ldm.scenes.relations import FOCAL, MARGIN, RELATIONS, SLANT, project, view
from ldm.scenes.statements import NAMES, Statement

THRESHOLD = 0.5  # candidates with a lower score are no objects
TOLERANCE = 0.8  # times the margins that relations keep in scenes
BESIDE, ABOVE = 0.75, 0.5  # stacked objects are less than this apart along the floor, and more than that in height


@dataclass(frozen=True)
class SeenObject:
    """An object as the judge sees it."""

    shape: str
    colour: str
    material: str
    size: str
    place: tuple[float, float, float]  # to the right, away, up, in world units
    centre: tuple[float, float]  # in the picture, 0 to 1 from its left and top
    score: float


@dataclass(frozen=True)
class Score:
    """Which parts of a statement are correct in a picture."""

    count: bool
    attributes: tuple[tuple[str, bool], ...]  # one for each attribute that is stated
    relations: tuple[tuple[str, bool], ...]

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """All of them, by name."""
        return (("count", self.count), *self.attributes, *self.relations)

    @property
    def correct(self) -> bool:
        """True if all parts are."""
        return all(correct for _, correct in self.parts)


def objects(detections: Detections) -> list[list[SeenObject]]:
    """The objects of each picture, in words."""
    names = [np.array(NAMES[name])[getattr(detections, name).argmax(-1).cpu().numpy()].tolist() for name in NAMES]
    numbers = [x.double().cpu().tolist() for x in (detections.place, detections.centre, detections.score)]
    candidates = ([SeenObject(*row) for row in zip(*picture)] for picture in zip(*names, *numbers))
    return [[candidate for candidate in row if candidate.score > THRESHOLD] for row in candidates]


def places(table: Table) -> NDArray[np.float64]:
    """(B, 3, 3) where objects are from the camera's point of view: to the right, away along the floor, up."""
    across = project(table, view(table))[0] * (table.camera[:, 2:] / FOCAL)
    azimuth = np.radians(table.camera[:, 0, None])
    return np.stack([across, table.y * np.cos(azimuth) - table.x * np.sin(azimuth), table.z], -1)


def holds(relation: str, a: SeenObject, b: SeenObject) -> bool:
    """True if a is seen in this relation to b."""
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


def score(seen: Sequence[SeenObject], statement: Statement) -> Score:
    """The best score over all assignments of the seen objects to the stated ones."""
    missing = [None] * (len(statement.objects) - len(seen))
    count = len(seen) == len(statement.objects)
    assignments = permutations([*seen, *missing], len(statement.objects))
    scores = [_score(assignment, statement, count) for assignment in assignments]
    return max(scores, key=lambda score: sum(correct for _, correct in score.parts))


def _score(assigned: Sequence[SeenObject | None], statement: Statement, count: bool) -> Score:
    attributes = [
        (name, getattr(seen, name, None) == value)
        for seen, spec in zip(assigned, statement.objects)
        for name in NAMES
        if (value := getattr(spec, name)) is not None
    ]
    related = [
        (relation, a is not None and b is not None and holds(relation, a, b))
        for i, relation, j in sorted(statement.relations)
        for a, b in [(assigned[i], assigned[j])]
    ]
    return Score(count, tuple(attributes), tuple(related))


def score_all(detections: Detections, statements: Sequence[Statement | Scene]) -> list[Score]:
    """The score of each picture's statement; a scene stands for everything that is true of it."""
    full = (each if isinstance(each, Statement) else Statement.of(each) for each in statements)
    return [score(seen, statement) for seen, statement in zip(objects(detections), full)]


def accepts(pictures: Tensor, statements: Sequence[Statement | Scene]) -> list[bool]:
    """True for each picture, (B, 3, H, W) in [-1, 1], in which the shipped judge finds its whole statement."""
    return [score.correct for score in score_all(pretrained.judge()(pictures), statements)]


def tally(scores: Iterable[Score]) -> dict[str, tuple[int, int]]:
    """(correct, total) for the count, each attribute, each relation, and `whole`: pictures that are all correct."""
    counts = {name: [0, 0] for name in ("count", *NAMES, *RELATIONS, "whole")}
    for score in scores:
        for name, correct in (*score.parts, ("whole", score.correct)):
            counts[name][0] += correct
            counts[name][1] += 1
    return {name: (correct, total) for name, (correct, total) in counts.items()}
