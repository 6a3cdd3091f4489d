"""Schedules at the points that define them, and numbers that no optimiser can mean."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.training.optimizers import adamw, constant, cosine, sgd


def test_cosine_starts_full_and_ends_at_its_last_part():
    assert cosine(0, 100) == 1.0
    assert cosine(50, 100) == pytest.approx(0.5)
    assert cosine(25, 100, final=0.2) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert cosine(100, 100, final=0.1) == pytest.approx(0.1)
    assert cosine(500, 100) == 0.0


@pytest.mark.parametrize("schedule", [constant, cosine])
def test_warmup_is_a_line_that_ends_at_one(schedule):
    rates = [schedule(step, 1000, warmup=4) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_constant_stays():
    assert {constant(step, 10) for step in range(50)} == {1.0}


def test_adamw_without_decay_is_adam():
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -3.0])) for _ in range(2))
    steps = (
        adamw([ours], lr=0.1, betas=(0.5, 0.9), weight_decay=0),
        torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.9)),
    )
    for k in range(5):
        for weight, optimizer in zip((ours, theirs), steps):
            weight.grad = torch.tensor([1.0, k - 2.0])
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: adamw([], lr=-1), "lr"),
        (lambda: sgd([], lr=1, weight_decay=-1), "weight_decay"),
        (lambda: adamw([], lr=1, betas=(0.9, 1.0)), "betas"),
        (lambda: adamw([], lr=1, eps=0), "eps"),
        (lambda: sgd([], lr=1, momentum=1.0), "momentum"),
        (lambda: constant(0, 1, warmup=-1), "warmup"),
        (lambda: cosine(0, 1, final=2), "final"),
    ],
)
def test_impossible_numbers_are_refused(make, word):
    with pytest.raises(ValueError, match=rf"^{word}: .*got"):
        make()
