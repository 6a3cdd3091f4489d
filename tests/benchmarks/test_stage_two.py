"""The gate before a second stage's step is timed beside diffusers', and the parts of its memory."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks import stage_two
from benchmarks.stage_two import ROWS, Shape, Side, check, memory_of, pair, within

TINY = Shape(channels=64, size=8, batch=1)


def altered_gradient(example):
    """Of one small weight by 1%, which neither the loss nor the whole gradient shows."""
    example.network.mid_block.resnets[1].norm1.bias.register_hook(lambda gradient: 1.01 * gradient)


def another_schedule(example):
    example.noises = DDPMScheduler(beta_schedule="linear")


def test_the_same_weights_pass_and_leave_nothing():
    loop, example = pair(TINY, ROWS["float32"])
    within(loop, lambda: check(loop, example, ROWS["float32"].tolerance))
    assert loop.counters.step == 0
    assert all(p.grad is None for network in (loop, example.network) for p in network.parameters())


@pytest.mark.parametrize(
    ("alter", "said"), [(altered_gradient, "mid_block.resnets.1.norm1.bias"), (another_schedule, "loss")]
)
def test_what_differs_is_not_timed(alter, said):
    loop, example = pair(TINY, ROWS["float32"])
    alter(example)
    with pytest.raises(SystemExit, match=f"{said}: .* nothing to time"):
        within(loop, lambda: check(loop, example, ROWS["float32"].tolerance))


def test_both_sides_keep_what_their_weights_say():
    loop, example = pair(TINY, ROWS["float32"])
    theirs = Side(example.step, example.network, example.optimizer, example.ema.shadow_params)
    found = []
    within(loop, lambda: found.extend(memory_of(side) for side in (stage_two.ours(loop), theirs)))
    weights = 4 * sum(p.numel() for p in loop.parameters())
    for memory in found:
        assert memory.weights == memory.gradients == memory.averages == weights
        assert memory.optimizer == pytest.approx(2 * weights, rel=1e-3)
    assert found[0].activations == pytest.approx(found[1].activations, rel=0.2)
    assert loop.counters.step == 1
    assert torch.isfinite(torch.tensor(list(loop.report.values()))).all()
