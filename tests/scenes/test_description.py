"""What scenes are: the same for the same index, well spread, apart, and with the relations that can be seen."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from ldm.scenes import (
    COLOURS,
    FLOORS,
    MATERIALS,
    SHAPES,
    SIZES,
    Camera,
    Light,
    Object,
    Scene,
    draw,
    relations,
    scene,
)
from ldm.scenes.description import RADIUS, Table
from ldm.scenes.drawing import HELD_OUT_COLOURS, HELD_OUT_RELATIONS, SPLITS, held_out, uniforms
from tests.scenes import world

MANY = 1500
MIRROR = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: draw(3, range(MANY), split).scenes() for split in SPLITS}


def test_a_scene_is_the_same_alone_and_in_any_batch(scenes):
    for index in (0, 7, MANY - 1):
        assert scene(3, index) == scenes["train"][index]
    assert draw(3, [9, 5, 9]).scenes() == [scenes["train"][i] for i in (9, 5, 9)]


def test_a_table_and_its_scenes_say_the_same(scenes):
    assert Table.of(scenes["train"]).scenes() == scenes["train"]


def test_seeds_indices_and_splits_share_no_scene(scenes):
    everything = [each for split in SPLITS for each in scenes[split]] + draw(4, range(MANY)).scenes()
    assert len(set(everything)) == 4 * MANY


def test_the_uniform_numbers_are_what_they_claim():
    u = uniforms(1, np.arange(4000), 0, 6)
    assert 0 <= u.min() <= u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.015
    assert np.abs(u.var(0) - 1 / 12).max() < 0.004
    assert np.abs(np.corrcoef(np.concatenate([u[:-1].T, u[1:].T])) - np.eye(12)).max() < 0.06
    assert np.array_equal(uniforms(1, np.arange(4000), 2, 4), u[:, 2:]), "a later number does not need the earlier ones"


def test_every_attribute_is_as_frequent_as_its_fellows(scenes):
    things = [thing for each in scenes["train"] for thing in each.objects]
    for names, of, least in (
        (SHAPES, "shape", 0.8),
        (COLOURS, "colour", 0.7),
        (MATERIALS, "material", 0.9),
        (SIZES, "size", 0.75),
    ):
        counts = [sum(getattr(thing, of) == name for thing in things) for name in names]
        assert min(counts) > least * len(things) / len(names), (of, counts)
    floors = [each.floor for each in scenes["train"]]
    assert min(floors.count(floor) for floor in FLOORS) > 0.85 * MANY / len(FLOORS)
    numbers = [len(each.objects) for each in scenes["train"]]
    assert min(numbers.count(n) for n in (1, 2, 3)) > 0.2 * MANY


def test_large_is_clearly_larger_than_small():
    assert RADIUS[1] / RADIUS[0] >= 1.5


def test_things_are_apart_and_rest_on_something(scenes):
    for each in scenes["train"][:400]:
        for thing in each.objects:
            bottom = thing.z - world.half_height(thing)
            below = [o for o in each.objects if abs(o.z + world.half_height(o) - bottom) < 1e-9]
            assert abs(bottom) < 1e-9 or any(o.shape in ("cube", "cylinder") for o in below)
        rng = np.random.default_rng(0)
        for a, b in itertools.combinations(each.objects, 2):
            p = np.array([a.x, a.y, a.z]) + rng.uniform(-1, 1, (400, 3))
            assert not (world.inside(a, p) & world.inside(b, p)).any()


def expected_relations(each: Scene) -> set[tuple[int, str, int]]:
    """By the definitions: along an axis by the margin, and by half of what the pair is apart across it."""
    found = set()
    for (i, a), (j, b) in itertools.permutations(enumerate(each.objects), 2):
        on, under = (
            abs(x.z - world.half_height(x) - y.z - world.half_height(y)) < 1e-6
            and math.dist((x.x, x.y), (y.x, y.y)) < 0.5 * world.RADIUS[y.size]
            for x, y in ((a, b), (b, a))
        )
        if on:
            found.add((i, "on top of", j))
        if on or under:
            continue
        left, right = (world.pictured(each, np.array([o.x, o.y, o.z]))[0] for o in (a, b))
        dx = (right - left) * 2 * each.camera.distance / world.FOCAL
        azimuth = math.radians(each.camera.azimuth)
        near, far = (o.y * math.cos(azimuth) - o.x * math.sin(azimuth) for o in (a, b))
        dy = far - near
        if dx > 0.6 and dx > 0.5 * abs(dy):
            found |= {(i, "left of", j), (j, "right of", i)}
        if dy > 0.6 and dy > 0.5 * abs(dx):
            found |= {(i, "in front of", j), (j, "behind", i)}
    return found


def test_relations_are_those_of_the_places_and_the_camera(scenes):
    for each in scenes["train"][:300] + scenes["held_out"][:100]:
        assert relations(each) == expected_relations(each)


def test_every_pair_has_a_relation(scenes):
    for each in scenes["train"][:300]:
        pairs = {frozenset((i, j)) for i, _, j in relations(each)}
        assert len(pairs) == math.comb(len(each.objects), 2)


def test_relations_turn_with_the_camera():
    a, b = (Object("sphere", "red", "matte", "small", x, 0.0, 0.45) for x in (-1.0, 1.0))
    front = Scene((a, b))
    assert relations(front) == {(0, "left of", 1), (1, "right of", 0)}
    assert relations(replace(front, camera=Camera(180.0))) == {(0, "right of", 1), (1, "left of", 0)}
    assert relations(replace(front, camera=Camera(90.0))) == {(0, "behind", 1), (1, "in front of", 0)}


def combinations(each: Scene) -> tuple[bool, bool]:
    """Whether a scene shows a held-out colour, a held-out relation."""
    rare = dict(zip(SHAPES, HELD_OUT_COLOURS))
    seen = {(each.objects[i].shape, r, each.objects[j].shape) for i, r, j in relations(each)}
    seen |= {(b, MIRROR[r], a) for a, r, b in seen if r in MIRROR}
    return any(rare[thing.shape] == thing.colour for thing in each.objects), bool(seen & set(HELD_OUT_RELATIONS))


def test_held_out_combinations_are_in_their_split_alone(scenes):
    for split in ("train", "validation"):
        assert not any(any(combinations(each)) for each in scenes[split])
    found = [combinations(each) for each in scenes["held_out"]]
    assert all(any(kinds) for kinds in found)
    colours, relation = np.mean(found, 0)
    assert colours > 0.3
    assert relation > 0.3
    assert held_out(Table.of(scenes["held_out"])).all()
    assert not held_out(Table.of(scenes["validation"])).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scene(()), "objects: out of range; got 0; expected 1 to 3"),
        (
            lambda: replace(scene(0, 0), light=Light(0.0, 10.0)),
            "light.elevation: out of range; got 10; expected 30 to 60",
        ),
        (
            lambda: replace(scene(0, 0), camera=Camera(0.0, 80.0)),
            "camera.elevation: out of range; got 80; expected 5 to 50",
        ),
        (
            lambda: replace(scene(0, 0), camera=Camera(distance=1.0)),
            "camera.distance: out of range; got 1; expected 6 to 20",
        ),
        (lambda: scene(0, 0, "test"), "split: unknown name; got test; expected one of train, validation, held_out"),
    ],
)
def test_what_is_no_scene_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
