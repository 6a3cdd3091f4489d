"""Edited twins: a scene with one change, and the instruction for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ldm.draws import stream
from ldm.scenes.captions import Draw, named, one, spoken
from ldm.scenes.description import (
    COLOURS,
    HALF_HEIGHT,
    MATERIALS,
    RADIUS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    Table,
)
from ldm.scenes.drawing import clear, held_out, uniforms
from ldm.scenes.relations import related, stands_on

VALUES = {"colour": COLOURS, "material": MATERIALS, "size": SIZES, "shape": SHAPES}
INSTRUCTIONS = {
    "colour": ("make the {} {}", "paint the {} {}", "turn the {} {}"),
    "material": ("make the {} {}",),
    "size": ("make the {} {}",),
    "shape": ("turn the {} into a {}", "replace the {} with a {}"),
    "removed": ("remove the {}", "take the {} away", "delete the {}"),
}
SLOTS = 20  # uniform numbers for an instruction


class Change(NamedTuple):
    """A change of one object, and the scene after it."""

    kind: str
    thing: Object
    value: str
    twin: Scene


def edit(scene: Scene, seed: int, index: int) -> tuple[Scene, str]:
    """A twin in which one object is changed or removed, and the instruction."""
    draw = iter(uniforms(stream(seed, "edits"), np.array([index]), 0, SLOTS)[0].tolist())
    possible = changes(scene)
    kind = one([kind for kind in INSTRUCTIONS if any(change.kind == kind for change in possible)], draw)
    change = one([change for change in possible if change.kind == kind], draw)
    return change.twin, _instruction(change, scene, draw)


def changes(scene: Scene) -> list[Change]:
    """All changes that leave a valid scene with every other object in its place."""
    possible = list(_changes(scene))
    table = Table.of([change.twin for change in possible])
    good = clear(table, related(table)) & (~held_out(table) | held_out(Table.of([scene]))[0])
    return [change for change, valid in zip(possible, good) if valid and _distinct(change.twin)]


def _changes(scene: Scene) -> Iterator[Change]:
    """All single changes; an object that carries another keeps its form, and one that is carried keeps its size."""
    stands = stands_on(Table.of([scene]))[0]
    for i, old in enumerate(scene.objects):
        kinds = ["colour", "material", *["shape"] * (not stands[:, i].any())]
        kinds += ["size"] * (not stands[:, i].any() and not stands[i].any())
        for kind in kinds:
            for value in VALUES[kind]:
                if value != getattr(old, kind):
                    new = _standing(replace(old, **dict[str, Any]({kind: value})), old)
                    yield Change(kind, old, value, replace(scene, objects=_with(scene, i, new)))
        if len(scene.objects) > 1 and not stands[:, i].any():
            yield Change("removed", old, "", replace(scene, objects=_with(scene, i)))


def _with(scene: Scene, i: int, *new: Object) -> tuple[Object, ...]:
    return (*scene.objects[:i], *new, *scene.objects[i + 1 :])


def _standing(new: Object, old: Object) -> Object:
    """The object in its new form, at the height of what carried the old one."""
    half = [RADIUS[SIZES.index(o.size)] * HALF_HEIGHT[SHAPES.index(o.shape)] for o in (new, old)]
    return replace(new, z=float(old.z - half[1] + half[0]))


def _distinct(scene: Scene) -> bool:
    """True if no two objects share both shape and colour."""
    return len({(each.shape, each.colour) for each in scene.objects}) == len(scene.objects)


def _instruction(change: Change, scene: Scene, draw: Draw) -> str:
    name = named(change.thing, scene.objects, draw)
    return one(INSTRUCTIONS[change.kind], draw).format(name, spoken(change.value, draw))
