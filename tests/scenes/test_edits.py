"""Edited twins: what the instruction says, and nothing else."""

import numpy as np
import pytest

from ldm.scenes import draw, edit, held_out, relations, render
from ldm.scenes.description import Table
from ldm.scenes.edits import changes
from tests.scenes import world
from tests.scenes.test_captions import MEANS

MANY = 300
FIELDS = ("shape", "colour", "material", "size")


@pytest.fixture(scope="module")
def edits():
    scenes = draw(2, range(MANY)).scenes()
    return [(scene, *edit(scene, 2, index)) for index, scene in enumerate(scenes)]


def test_the_instruction_says_what_differs(edits):
    kinds = set()
    for scene, twin, instruction in edits:
        words = [MEANS[word] for word in instruction.replace(",", "").split() if word in MEANS]
        gone = [thing for thing in scene.objects if thing not in twin.objects]
        assert len(gone) == 1
        new = [thing for thing in twin.objects if thing not in scene.objects]
        assert (twin.floor, twin.light, twin.camera) == (scene.floor, scene.light, scene.camera)
        if new:
            changed = [field for field in FIELDS if getattr(gone[0], field) != getattr(new[0], field)]
            assert len(changed) == 1
            assert (new[0].x, new[0].y) == (gone[0].x, gone[0].y)
            assert new[0].z - world.half_height(new[0]) == pytest.approx(gone[0].z - world.half_height(gone[0]))
            assert words.pop() == (changed[0], getattr(new[0], changed[0]))
            kinds.add(changed[0])
        else:
            assert instruction.split()[0] in ("remove", "take", "delete")
            kinds.add("removed")
        named = [thing for thing in scene.objects if all(getattr(thing, field) == value for field, value in words)]
        assert named == gone, instruction
    assert kinds == {*FIELDS, "removed"}


def test_a_twin_is_a_scene_of_the_same_split(edits):
    assert not held_out(Table.of([twin for _, twin, _ in edits])).any()
    for _, twin, _ in edits:
        assert len({(thing.shape, thing.colour) for thing in twin.objects}) == len(twin.objects)
        pairs = {frozenset((i, j)) for i, _, j in relations(twin)}
        assert len(pairs) == len(twin.objects) * (len(twin.objects) - 1) // 2, "and nothing floats"


def test_another_paint_changes_the_pixels_of_its_thing_alone():
    scenes = draw(2, range(12)).scenes()
    pairs = [(scene, each.twin) for scene in scenes for each in changes(scene) if each.kind in ("colour", "material")][
        ::9
    ]
    before, after = (render(which, 48, want=("image", "mask")) for which in zip(*pairs))
    assert (before["mask"] == after["mask"]).all()
    differs = (before["image"] != after["image"]).any(1)
    for (scene, twin), pixels, mask in zip(pairs, differs, before["mask"]):
        i = next(i for i, pair in enumerate(zip(scene.objects, twin.objects)) if pair[0] != pair[1])
        near = np.pad(mask == i + 1, 1)
        near = np.any([np.roll(near, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], 0)[1:-1, 1:-1]
        assert pixels.any()
        assert not pixels.numpy()[~near].any()


def test_what_is_removed_is_seen_to_be_gone(edits):
    scenes, twins = zip(*[(scene, twin) for scene, twin, _ in edits if len(twin.objects) < len(scene.objects)])
    for mask, scene in zip(render(twins, 32, want=("mask",))["mask"], scenes):
        assert mask.max() == len(scene.objects) - 1


def test_an_edit_is_a_function_of_seed_and_index(edits):
    assert edit(edits[7][0], 2, 7) == edits[7][1:]
    assert len({edit(edits[7][0], 2, i)[1] for i in range(30)}) > 10
