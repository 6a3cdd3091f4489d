"""The judge's training: its targets, its loss, and its reproducibility."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.scenes import judge_training as training
from ldm.scenes.drawing import draw
from ldm.scenes.judge import CELLS, Maps
from ldm.scenes.judge_accuracy import measure, pictures
from ldm.scenes.judge_training import Truth, cell, corrupted, loss, mask_loss, objectness, truth
from ldm.scenes.relations import project, view
from ldm.scenes.render import render
from ldm.scenes.statements import NAMES


def some(count: int = 6) -> Truth:
    table = draw(3, range(count))
    return truth(table, render(table, 64, want=("mask",))["mask"])


def perfect(answer: Truth) -> Maps:
    """Maps that say the truth in every cell that is nearest to an object."""
    cells = torch.stack(torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="xy"), -1)  # (32, 32, 2)
    apart = (cells + 0.5 - answer.centre[:, :, None, None] * CELLS).norm(dim=-1)  # (B, 3, 32, 32)
    owner = apart.masked_fill(~answer.there[..., None, None], 99).argmin(1)  # (B, 32, 32)
    row = torch.arange(len(owner))[:, None, None]
    score = torch.full((len(owner), CELLS * CELLS), -20.0)
    for i, j in answer.there.nonzero().tolist():
        score[i, cell(answer)[i, j]] = 20.0
    kinds = [
        40.0 * F.one_hot(answer.names[row, owner, i].clamp(min=0), len(NAMES[name])) for i, name in enumerate(NAMES)
    ]
    offset = answer.centre[row, owner] * CELLS - cells
    query = 1.0 * F.one_hot(owner, 16)
    pixels = torch.zeros(len(owner), 16, CELLS, CELLS)
    pixels[:, :3] = torch.where(answer.mask > 0.5, 20.0, -20.0)
    return Maps(score.reshape(-1, CELLS, CELLS), *kinds, offset, answer.place[row, owner], query, pixels)


def test_the_truth_is_that_of_the_description():
    table, answer = draw(3, range(40)), some(40)
    across, up, _ = project(table, view(table))
    projected = torch.stack([torch.from_numpy(across) + 1, 1 - torch.from_numpy(up)], -1) / 2  # (B, 3, 2) of whole ones
    away = (projected - answer.centre).norm(dim=-1)[answer.there]
    assert away.median() < 0.015
    assert away.max() < 0.12  # what is seen of an object is not always its middle
    assert torch.equal(answer.there, torch.from_numpy(table.there))
    assert torch.equal(answer.names[..., 1], torch.from_numpy(table.colour))
    assert (answer.mask.sum(1) <= 1 + 1e-6).all()
    resting = answer.there.clone()
    resting[:, 0] = False  # the first may stand on the second
    assert (answer.place[resting][:, 2] < 0.9).all()


def test_saying_the_truth_costs_next_to_nothing_and_each_lie_something():
    answer = some()
    maps = perfect(answer)
    edges = mask_loss(maps, answer)  # cells that are partly an object's cannot be told
    assert loss(maps, answer) - edges < 1e-3
    assert objectness(maps.score, torch.zeros_like(maps.score), answer) < 1e-6
    for name, x in maps._asdict().items():
        lie = maps._replace(**{name: x.flip(0)})
        assert loss(lie, answer) > loss(maps, answer) + 0.05, name


def test_detections_of_true_maps_are_correct():
    table = draw(3, range(6))
    images, instances = pictures(table, 64)
    maps = perfect(truth(table, instances))
    right = measure(lambda x: maps.detections(), table, images, instances)
    assert {name: right[name] for name in ("count", *NAMES, "whole")} == dict.fromkeys(("count", *NAMES, "whole"), 1.0)
    assert right["mask overlap"] > 0.99
    assert right["false statements accepted"] < 0.05


def test_pictures_are_corrupted_a_little_and_repeatably():
    x = render(draw(4, range(8)), 64)["image"].float() / 127.5 - 1
    once, again = (corrupted(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.abs().max() <= 1
    off = (once - x).square().mean((1, 2, 3)).sqrt()
    assert (off > 0.005).all()
    assert (off < 0.3).all()


def test_it_learns_the_same_twice():
    first, second = (training.train(steps=3, pictures=8, seed=1, report=lambda text: None) for _ in range(2))
    for name, x in first.state_dict().items():
        assert torch.equal(x, second.state_dict()[name]), name


@pytest.mark.slow
def test_it_learns():
    table = draw(0, range(12))
    before, after = (training.train(steps=steps, pictures=16, seed=0, report=lambda text: None) for steps in (1, 300))
    right = [measure(judge, table, *pictures(table, 64)) for judge in (before, after)]
    assert right[0]["whole"] == 0
    assert right[1]["whole"] > 0.7
