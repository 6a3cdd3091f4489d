"""Statements parsed from captions, and false ones made from true ones."""

from __future__ import annotations

from itertools import permutations

import pytest

from ldm.scenes.captions import captions
from ldm.scenes.drawing import draw
from ldm.scenes.statements import ObjectSpec, Statement, swaps


def implied(statement: Statement, by: Statement) -> bool:
    """Whether some way to tell which object is which makes all of a statement part of another."""

    def fits(order: tuple[int, ...]) -> bool:
        named = all(
            value in (None, getattr(by.objects[j], name))
            for one, j in zip(statement.objects, order)
            for name, value in vars(one).items()
        )
        return named and {(order[i], relation, order[j]) for i, relation, j in statement.relations} <= by.relations

    return len(statement.objects) == len(by.objects) and any(map(fits, permutations(range(len(by.objects)))))


@pytest.mark.parametrize(
    ("caption", "objects", "relations"),
    [
        ("a shiny red sphere", [("sphere", "red", "shiny", None)], []),
        (
            "There is a little grey box on the left of an object on a gray floor",
            [("cube", "gray", None, "small"), (None, None, None, None)],
            [(0, "left of", 1)],
        ),
        (
            "a cone behind a ball and in front of a cube",
            [("cone", None, None, None), ("sphere", None, None, None), ("cube", None, None, None)],
            [(0, "behind", 1), (0, "in front of", 2)],
        ),
        (
            "a cone sitting on a block, which is right of a violet ball",
            [("cone", None, None, None), ("cube", None, None, None), ("sphere", "purple", None, None)],
            [(0, "on top of", 1), (1, "right of", 2)],
        ),
        (
            "a red cone, and a blue cone behind a green cone",
            [("cone", "red", None, None), ("cone", "blue", None, None), ("cone", "green", None, None)],
            [(1, "behind", 2)],
        ),
        ("an astronaut on a horse", [], []),
    ],
)
def test_what_a_caption_states(caption, objects, relations):
    assert Statement.parse(caption) == Statement(tuple(ObjectSpec(*names) for names in objects), frozenset(relations))


@pytest.mark.parametrize("split", ["validation", "held_out"])
def test_captions_state_what_their_scenes_show(split):
    table = draw(11, range(400), split)
    full = [Statement.of(scene) for scene in table.scenes()]
    read = [Statement.parse(caption) for caption in captions(table, 11, range(400))]
    assert all(implied(statement, truth) for statement, truth in zip(read, full))
    wrong = sum(implied(statement, truth) for statement, truth in zip(read, full[1:] + full[:1]))
    assert wrong < 40  # a caption is rarely true of another scene
    assert sum(bool(statement.relations) for statement in read) > 200


def test_each_swap_is_false_of_its_scene_and_near_it():
    for scene in draw(12, range(40)).scenes():
        truth = Statement.of(scene)
        for name, statement in swaps(truth):
            assert not implied(statement, truth)
            changed = sum(a != b for a, b in zip(statement.objects, truth.objects))
            assert (changed, len(statement.relations - truth.relations)) == (
                (0, 1) if " " in name or name == "behind" else (1, 0)
            )


def test_how_many_swaps_there_are():
    one, two = (next(s for s in draw(13, range(99)).scenes() if len(s.objects) == n) for n in (1, 2))
    assert len(list(swaps(Statement.of(one)))) == 3 + 7 + 1 + 1
    names = [name for name, _ in swaps(Statement.of(two))]
    assert names.count("colour") == 14
    assert len(names) == 24 + 10 - len(Statement.of(two).relations)
