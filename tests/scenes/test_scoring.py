"""Scores of detections made by hand, and the shipped judge on renders that training never shows."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.checkpoint.files import open_file
from ldm.pictures import to_float
from ldm.scenes import pretrained
from ldm.scenes.description import Table
from ldm.scenes.drawing import draw
from ldm.scenes.judge import CANDIDATES, KINDS, Detections
from ldm.scenes.judge_accuracy import CORRUPTIONS, blurred, measure, overlap, pictures, table
from ldm.scenes.render import render
from ldm.scenes.scoring import SeenObject, accepts, holds, objects, places, score, tally
from ldm.scenes.statements import NAMES, ObjectSpec, Statement, swaps


def seen(shape="cube", colour="red", material="matte", size="small", place=(0.0, 0.0, 0.5)) -> SeenObject:
    return SeenObject(shape, colour, material, size, place, (0.5, 0.5), 0.9)


def read_perfectly(scenes: Table) -> list[list[SeenObject]]:
    """The objects that a perfect judge would see."""
    where = places(scenes).tolist()
    return [
        [seen(o.shape, o.colour, o.material, o.size, tuple(where[row][i])) for i, o in enumerate(scene.objects)]
        for row, scene in enumerate(scenes.scenes())
    ]


# --------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("split", ["validation", "held_out"])
def test_perfect_detections_accept_all_true_statements_and_few_false_ones(split):
    scenes = draw(5, range(150), split)
    false = []
    for row, scene in zip(read_perfectly(scenes), scenes.scenes()):
        truth = Statement.of(scene)
        assert score(row[::-1], truth).correct
        false += [(name, score(row, statement).correct) for name, statement in swaps(truth)]
    assert not any(accepted for name, accepted in false if name in NAMES)
    assert sum(accepted for _, accepted in false) < 0.02 * len(false)  # relations on the margin


@pytest.mark.parametrize(
    ("place", "true"),
    [
        ((-1.0, 0.0, 0.5), {"left of"}),
        ((1.0, 0.3, 0.5), {"right of"}),
        ((-1.0, 1.0, 0.5), {"left of", "behind"}),
        ((0.1, -1.0, 0.5), {"in front of"}),
        ((0.3, 0.0, 0.5), set()),
        ((2.0, 0.7, 0.5), {"right of"}),
        ((0.1, 0.0, 1.4), {"on top of"}),
        ((1.5, 0.0, 1.4), {"right of"}),
    ],
)
def test_relations_are_read_off_places(place, true):
    a, b = seen(place=place), seen()
    assert {
        relation for relation in ("left of", "right of", "in front of", "behind", "on top of") if holds(relation, a, b)
    } == true


def test_a_score_counts_each_part_under_the_best_assignment():
    red_left_of_blue = Statement(
        (ObjectSpec("cube", "red"), ObjectSpec("cone", "blue")), frozenset({(0, "left of", 1)})
    )
    found = score([seen("cone", "blue"), seen("cube", "green", place=(-1, 0, 0.5))], red_left_of_blue)
    assert found.count
    assert found.attributes == (("shape", True), ("colour", False), ("shape", True), ("colour", True))
    assert found.relations == (("left of", True),)
    assert not found.correct
    counts = tally([found, found])
    assert counts["colour"] == (2, 4)
    assert (counts["whole"], counts["count"], counts["size"]) == ((0, 2), (2, 2), (0, 0))


def test_too_few_and_too_many_objects_are_wrong():
    statement = Statement((ObjectSpec("cube"), ObjectSpec("cone")), frozenset({(0, "left of", 1)}))
    few = score([seen("cone")], statement)
    assert (few.count, few.attributes, few.relations) == (
        False,
        (("shape", False), ("shape", True)),
        (("left of", False),),
    )
    many = score([seen("cone"), seen("cube", place=(-1, 0, 0.5)), seen("sphere")], statement)
    assert not many.count
    assert all(right for _, right in many.attributes + many.relations)
    assert not score([], statement).correct


def test_swapped_colours_are_not_correct():
    statement = Statement((ObjectSpec("cube", "red"), ObjectSpec("cone", "blue")))
    assert score([seen("cone", "blue"), seen("cube", "red")], statement).correct
    assert not score([seen("cone", "red"), seen("cube", "blue")], statement).correct


def test_detections_in_words():
    probabilities = [torch.eye(kinds)[torch.arange(CANDIDATES) % kinds][None] for kinds in KINDS]
    scores = torch.tensor([[0.9, 0.8, 0.4, 0.1, 0, 0]])
    detections = Detections(
        scores,
        *probabilities,
        torch.rand(1, CANDIDATES, 2),
        torch.rand(1, CANDIDATES, 3),
        torch.rand(1, CANDIDATES, 32, 32),
    )
    first, second = objects(detections)[0]
    assert (first.shape, first.colour, first.material, first.size) == ("sphere", "red", "matte", "small")
    assert (second.shape, second.colour, second.material, second.size) == ("cube", "green", "shiny", "large")
    assert second.place == pytest.approx(detections.place[0, 1].tolist())


def test_overlap_by_hand():
    instances = torch.zeros(1, 64, 64, dtype=torch.int64)
    instances[:, :, :32] = 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24] = 1  # half of it, and as much beside it
    nothing = [torch.ones(1, 1, kinds) for kinds in (*KINDS, 2, 3)]
    assert overlap(Detections(torch.ones(1, 1), *nothing, mask), instances).tolist() == pytest.approx([1 / 3])
    assert overlap(Detections(torch.zeros(1, 1), *nothing, mask), instances).tolist() == [0]


def test_blurring_keeps_the_mean_and_widens_a_point():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 16] = 1
    soft = blurred(x, 0.7)
    torch.testing.assert_close(soft.sum((2, 3)), torch.ones(1, 3))
    away = (torch.arange(33.0) - 16).square()
    torch.testing.assert_close(soft.sum(2) @ away, torch.full((1, 3), 0.49), atol=0.01, rtol=0)


# ------------------------------------------------------------------------------------------ the shipped judge


def test_the_shipped_file_is_small_and_knows_the_names():
    path = pretrained.FOLDER / "judge.safetensors"
    assert path.stat().st_size <= 4e6
    metadata = open_file(path).metadata
    assert json.loads(metadata["names"]) == {name: list(words) for name, words in NAMES.items()}
    assert metadata["command"].startswith("ldm judge --")
    assert sum(x.numel() for x in pretrained.judge().parameters()) < 1e6


def test_the_shipped_judge_is_frozen_and_one():
    judge = pretrained.judge()
    assert judge is pretrained.judge()
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


@pytest.mark.parametrize(
    ("split", "corruption"), [("validation", "clean"), ("held_out", "blurred"), ("held_out", "noised")]
)
def test_the_shipped_judge_reads_renders_that_training_never_shows(split, corruption):
    scenes = draw(77, range(200), split)
    right = measure(pretrained.judge(), scenes, *pictures(scenes, 64), CORRUPTIONS[corruption])
    assert min(right[name] for name in ("count", *NAMES)) > 0.97, right
    assert right["whole"] > 0.9, right
    assert right["false statements accepted"] < 0.05
    assert right["mask overlap"] > 0.8
    assert "whole, three objects" in table({"a": right})


def test_it_reads_large_pictures_and_captions():
    scenes = draw(78, range(20), "validation")
    large = to_float(render(scenes, 256)["image"])
    assert sum(accepts(large, scenes.scenes())) >= 18
    assert sum(accepts(large, scenes.scenes()[1:] + scenes.scenes()[:1])) == 0


def test_noise_shows_no_statement():
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert sum(accepts(x, draw(79, range(8)).scenes())) == 0


def test_its_places_and_centres_are_those_of_the_objects():
    scenes = draw(80, range(50), "validation")
    found = objects(pretrained.judge()(to_float(render(scenes, 64)["image"])))
    off = [
        min(sum((p - q) ** 2 for p, q in zip(one.place, there)) ** 0.5 for one in row)
        for row, where, present in zip(found, places(scenes), scenes.there)
        for there in where[present]
    ]
    assert sorted(off)[len(off) // 2] < 0.15  # world units; a small object is one wide
    assert sorted(off)[int(0.95 * len(off))] < 0.5
