"""What configurations cost on the meta device is what `ldm doctor` counts on a real one; the page has all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.configs import ONE, ROOT, cost_of, first_stage, operations, row
from ldm.assemble import AutoencoderSchema
from ldm.config import schema as configuration
from ldm.training.needs import flops_of, size
from ldm.training.recipes import autoencoder

PAGE = (Path(__file__).parent.parent.parent / "docs/configs.md").read_text(encoding="utf-8")


@pytest.fixture
def scenes():
    """The small first stage without memory."""
    return stage_of("scenes")


def stage_of(name):
    """A first stage that takes no memory."""
    stage = first_stage(ROOT / f"autoencoder/{name}.yaml")
    stage.trainer = stage.plan.trainer([], stage.unused)
    return stage


def test_operations_are_those_of_a_real_stage(scenes):
    """In each phase of the game."""
    given = [*ONE, "trainer.precision=32-true"]
    real = autoencoder.build(configuration.load(ROOT / "autoencoder/scenes.yaml", given, AutoencoderSchema))
    real.trainer = real.plan.trainer([], real.unused)
    counts = []
    for first in scenes.phases().values():
        real.step = scenes.step = first
        counts.append(operations(scenes))
        assert counts[-1] == flops_of(real)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("name", "moments"), [("scenes", 1), ("kl_f4", 2)])
def test_bytes_are_weights_gradients_moments_and_the_average(name, moments):
    """Muon has one moment, AdamW two."""
    stage = stage_of(name)
    cost = cost_of(stage)
    numbers = {name: sum(p.numel() for _, p in group) for name, group in stage.groups().items()}
    assert cost.trained == sum(numbers.values())
    learned = (1 + moments) * cost.trained + numbers[stage.main]
    assert cost.memory == size([*stage.parameters(), *stage.buffers()]) + 4 * learned


def test_the_page_has_every_configuration(scenes):
    names = {file.stem for folder in ("autoencoder", "ldm") for file in (ROOT / folder).glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == names
    assert f"| {' | '.join(row('scenes', cost_of(scenes)))} |" in PAGE
