"""Scenes as a pure function of (seed, index): attributes first, then places until everything is clearly visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.draws import stream
from ldm.scenes.description import (
    COLOURS,
    FLOORS,
    HALF_HEIGHT,
    OBJECTS,
    REACH,
    SHAPES,
    Floats,
    Integers,
    Scene,
    Table,
)
from ldm.scenes.relations import FOCAL, RELATIONS, project, related, view

SPLITS = ("train", "validation", "held_out")
# only in held_out: one colour of each shape, in the order of SHAPES, and these relations with their mirror images
HELD_OUT_COLOURS = ("cyan", "purple", "green", "red")
HELD_OUT_RELATIONS = (("sphere", "left of", "cylinder"), ("cube", "behind", "sphere"), ("cone", "on top of", "cube"))

RARE = np.array([COLOURS.index(colour) for colour in HELD_OUT_COLOURS])  # by shape
USUAL = np.array([[c for c in range(len(COLOURS)) if c != rare] for rare in RARE])  # (shapes, 7)
TRIPLES = [(SHAPES.index(a), RELATIONS.index(r), SHAPES.index(b)) for a, r, b in HELD_OUT_RELATIONS]
ON = RELATIONS.index("on top of")
FLAT = [SHAPES.index("cube"), SHAPES.index("cylinder")]  # shapes that can carry an object
COUNTS = np.array([0.25, 0.7])  # share of scenes with one object, with at most two
STACKED = 0.9  # share of the pairs that can be stacked
SPREAD = 1.9  # half of the side of the square of all centres
GAP = 0.12  # between objects, in world units
OVERLAP = 0.82  # least distance of centres in the picture, in sums of radii
EDGE = 0.92  # objects stay within this share of the picture's half
TRIES, SLOTS = 6, 20  # placements drawn at a time, uniform numbers of a scene before them


def uniforms(seed: int, numbers: Integers, first: int, count: int) -> Floats:
    """(B, count) numbers in [0, 1) of the sequence of each number, from `first` on, by hashing twice."""
    row = _mixed(numbers.astype(np.uint64) + (np.uint64(seed) << np.uint64(32)))
    slot = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(row[:, None] + slot) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Constraints(NamedTuple):
    """Constraints: the held-out relation between the first two objects, or -1, and whether they are stacked."""

    triple: Integers
    stack: NDArray[np.bool_]

    def take(self, rows: NDArray) -> Constraints:
        return Constraints(self.triple[rows], self.stack[rows])


def draw(
    seed: int, indices: Sequence[int] | Integers, split: str = "train", most: int = OBJECTS, full: float = 0.0
) -> Table:
    """The scenes of these indices, with at most `most` objects, and a share `full` with exactly as many."""
    if split not in SPLITS:
        raise ValueError(f"split: unknown name; got {split}; expected one of {', '.join(SPLITS)}")
    key, numbers = stream(seed, f"scenes {split}"), np.asarray(indices, dtype=np.int64)
    table, constraints = _attributes(uniforms(key, numbers, 0, SLOTS), split == "held_out", most, full)
    waiting, tried = np.arange(len(table)), 0
    while len(waiting):
        u = uniforms(key, numbers[waiting], SLOTS + tried * 2 * OBJECTS, TRIES * 2 * OBJECTS)
        rows = np.repeat(waiting, TRIES)
        placed = _placed(table[rows], constraints.take(rows), u.reshape(len(rows), 2, OBJECTS))
        seen = related(placed)
        good = (clear(placed, seen) & _allowed(placed, seen, constraints.triple[rows])).reshape(-1, TRIES)
        found, first = good.any(1), good.argmax(1)
        chosen = placed[(np.arange(len(waiting)) * TRIES + first)[found]]
        for name in ("x", "y", "z"):
            getattr(table, name)[waiting[found]] = getattr(chosen, name)
        waiting, tried = waiting[~found], tried + TRIES
    return table


def scene(seed: int, index: int, split: str = "train") -> Scene:
    """The scene of this index."""
    return draw(seed, [index], split).scenes()[0]


def _attributes(u: Floats, held_out: bool, most: int, full: float) -> tuple[Table, Constraints]:
    """Everything except the places, from SLOTS uniform numbers of each scene."""
    rows = len(u)
    count = np.minimum(1 + (u[:, 0, None] >= COUNTS).sum(1), most)
    count[u[:, 18] < full] = most
    triple = np.full(rows, -1)
    if held_out:  # half have a rare colour, half a rare relation
        triple = np.where(u[:, 1] < 0.5, -1, (u[:, 2] * len(TRIPLES)).astype(np.int64))
        count = np.where(triple >= 0, np.maximum(count, 2), count)
    shape, colour = _pairs(u[:, 3:6], triple, held_out)
    size, material = (u[:, 6:9] < 0.5).astype(np.int64), (u[:, 9:12] < 0.5).astype(np.int64)
    size[_relation(triple) == ON, 0] = 0
    size[:, 2] *= size[:, :2].min(1) == 0  # three large objects would hide each other
    stack = (count > 1) & (size[:, 0] == 0) & np.isin(shape[:, 1], FLAT) & (u[:, 12] < STACKED)
    for a, relation, b in TRIPLES:
        stack &= (relation != ON) | (shape[:, 0] != a) | (shape[:, 1] != b)
    stack = np.where(triple >= 0, _relation(triple) == ON, stack)
    absent = np.arange(OBJECTS) >= count[:, None]
    shape, colour, material, size = (np.where(absent, -1, names) for names in (shape, colour, material, size))
    side = 270 + np.where(u[:, 13] < 0.5, -72, 22) + 100 * (u[:, 13] % 0.5)  # from the left or the right
    light = np.stack([side, 38 + 14 * u[:, 14]], 1)
    camera = np.stack([30 * u[:, 15] - 15, 27 + 8 * u[:, 16], np.full(rows, 9.0)], 1)
    turn = np.where(absent, 0.0, 90 * (u[:, 3:6] * 997 % 1))  # digits that the choice of a shape leaves unused
    floor = (u[:, 17] * len(FLOORS)).astype(np.int64)
    x, y, z = (np.zeros((rows, OBJECTS)) for _ in range(3))
    table = Table(shape, colour, material, size, x, y, z, turn, floor, light, camera, np.zeros(rows))
    return table, Constraints(triple, stack)


def _relation(triple: Integers) -> Integers:
    return np.where(triple >= 0, np.array([relation for _, relation, _ in TRIPLES])[triple], -1)


def _pairs(u: Floats, triple: Integers, held_out: bool) -> tuple[Integers, Integers]:
    """(B, 3) shapes and colours; no two objects of a scene share both."""
    colours = USUAL.shape[1]
    total = len(SHAPES) * colours
    pair = (u * (total - np.arange(OBJECTS))).astype(np.int64)
    for i, ends in enumerate(zip(*((a, b) for a, _, b in TRIPLES))):  # the shapes of a held-out relation
        pair[:, i] = np.where(triple >= 0, np.array(ends)[triple] * colours + pair[:, i] % colours, pair[:, i])
    free = triple < 0
    pair[:, 1] += free & (pair[:, 1] >= pair[:, 0])
    low, high = pair[:, :2].min(1), pair[:, :2].max(1)
    pair[:, 2] += pair[:, 2] >= low
    pair[:, 2] += pair[:, 2] >= high
    shape = pair // colours
    colour = USUAL[shape, pair % colours]
    if held_out:
        colour[free, 0] = RARE[shape[free, 0]]
    return shape, colour


def _placed(table: Table, constraints: Constraints, u: Floats) -> Table:
    """The table with objects on the floor, or the first one on the second, near its middle."""
    half, stack = table.extent(HALF_HEIGHT), constraints.stack
    x, y = ((2 * u[:, i] - 1) * SPREAD * table.there for i in range(2))
    z = half.copy()
    for place in (x, y):
        place[stack, 0] = place[stack, 1] + 0.05 * place[stack, 0]
    z[stack, 0] = 2 * half[stack, 1] + half[stack, 0]
    return replace(table, x=x, y=y, z=z)


def clear(table: Table, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(B,) True if objects are apart, inside the picture and not hidden, and every pair is visibly related."""
    pair = np.triu(table.there[:, :, None] & table.there[:, None], 1)
    stacked = seen[:, ON] | seen[:, ON].swapaxes(1, 2)
    across, up, depth = project(table, view(table))
    apart = _distance(table.x, table.y) - _sums(table.extent(REACH)) > GAP
    radius = FOCAL * table.radius / depth
    visible = _distance(across, up) > OVERLAP * _sums(radius)
    reach, tall = _spans(table, depth)
    inside = ((np.abs(across) + reach < EDGE) & (np.abs(up) + tall < EDGE)) | ~table.there
    clear = (apart & visible & seen.any(1)) | stacked | ~pair
    return np.asarray(inside.all(1) & clear.all((1, 2)))


def _spans(table: Table, depth: Floats) -> tuple[Floats, Floats]:
    """(B, 3) upper bounds of half the width and half the height of each object in the picture."""
    reach, elevation = table.extent(REACH), np.radians(table.camera[:, 1, None])
    tall = table.extent(HALF_HEIGHT) * np.cos(elevation) + reach * np.sin(elevation)
    return FOCAL * reach / (depth - reach), FOCAL * tall / (depth - reach)


def _allowed(table: Table, seen: NDArray[np.bool_], triple: Integers) -> NDArray[np.bool_]:
    """(B,) True if the required held-out relation is visible, or none if none is required."""
    rare = _held_out_relations(table, seen)
    return np.where(triple < 0, ~rare.any(1), rare[np.arange(len(table)), triple])


def _held_out_relations(table: Table, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(B, triples) True for held-out relations that are visible."""
    named = [
        seen[:, relation] & (table.shape[:, :, None] == a) & (table.shape[:, None] == b) for a, relation, b in TRIPLES
    ]
    return np.asarray(np.stack(named, 1).any((2, 3)))


def _distance(x: Floats, y: Floats) -> Floats:
    """Pairwise distances, (B, 3) to (B, 3, 3)."""
    return np.hypot(x[:, :, None] - x[:, None], y[:, :, None] - y[:, None])


def _sums(radius: Floats) -> Floats:
    return radius[:, :, None] + radius[:, None]


def held_out(table: Table) -> NDArray[np.bool_]:
    """(B,) True if a scene shows a combination that is held out of training."""
    rare = table.there & (table.colour == RARE[table.shape])
    return np.asarray(rare.any(1) | _held_out_relations(table, related(table)).any(1))
