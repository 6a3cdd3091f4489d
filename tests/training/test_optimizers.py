"""Schedules at the points that define them, and numbers that no optimiser can mean."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ldm.training import muon
from ldm.training.muon import Muon, orthogonal
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


def test_orthogonal_matrices_turn_as_the_polar_factor_does():
    """The rounds bring singular values near 1, and keep the singular vectors."""
    torch.manual_seed(0)
    for x in (torch.randn(3, 20, 50), torch.randn(2, 50, 20)):
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        values = left.mT @ orthogonal(x).float() @ right.mT  # (N, 20, 20)
        diagonal = values.diagonal(dim1=1, dim2=2)
        assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
        assert (values - diagonal.diag_embed()).abs().max() < 0.05


def test_muon_is_torch_s_for_matrices_and_adamw_for_the_rest(monkeypatch):
    """Matrices of one shape are moved together or apart alike."""
    torch.manual_seed(0)
    shapes = ((40, 24), (24, 40), (40, 24), (40,), (3, 24), (40, 8))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs, parts = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = [
        Muon(ours, lr=0.01),
        torch.optim.Muon(theirs[:3], lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:], lr=0.01, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    apart = Muon(parts, lr=0.01)
    for _ in range(4):
        for weights in zip(ours, theirs, parts):
            gradient = torch.randn_like(weights[0])
            for weight in weights:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(muon, "ROOM", 1)
            apart.step()
    for a, b, c in zip(ours, theirs, parts):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-6)


def test_a_kernel_moves_as_its_matrix_does():
    """Whatever the order of its numbers in memory."""
    torch.manual_seed(0)
    start, gradient = torch.randn(32, 20, 3, 3), torch.randn(32, 20, 3, 3)
    kernel = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    for weight in (kernel, matrix):
        weight.grad = gradient.view(weight.shape)
        Muon([weight], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=1e-6)
    assert not torch.equal(kernel, start)


def test_muon_s_rate_is_one_for_all():
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 16), (4,))]
    optimizer = Muon(weights, lr=1.0, weight_decay=0)
    for settings in optimizer.param_groups:
        settings["lr"] = 0.0
    for weight in weights:
        weight.grad = torch.rand_like(weight)
    optimizer.step()
    assert all((weight == 1).all() for weight in weights)


def test_sgd_is_torch_s_with_its_momentum_and_decay():
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -3.0])) for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = {ours: sgd([ours], **settings), theirs: torch.optim.SGD([theirs], **settings)}
    for k in range(4):
        for weight, optimizer in optimizers.items():
            weight.grad = torch.tensor([1.0, k - 2.0])
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: adamw([], lr=-1), "lr"),
        (lambda: sgd([], lr=1, weight_decay=-1), "weight_decay"),
        (lambda: adamw([], lr=1, betas=(0.9, 1.0)), "betas"),
        (lambda: adamw([], lr=1, eps=0), "eps"),
        (lambda: sgd([], lr=1, momentum=1.0), "momentum"),
        (lambda: Muon([], lr=1, momentum=1.0), "momentum"),
        (lambda: Muon([], lr=-1), "lr"),
        (lambda: constant(0, 1, warmup=-1), "warmup"),
        (lambda: cosine(0, 1, final=2), "final"),
    ],
)
def test_impossible_numbers_are_refused(make, word):
    with pytest.raises(ValueError, match=rf"^{word}: .*got"):
        make()
