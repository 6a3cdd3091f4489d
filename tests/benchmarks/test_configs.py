"""What configurations cost on the meta device is what `ldm doctor` counts on a real one; the page has all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.configs import HEAD, ONE, ROOT, cost_of, files, first_stage, operations, row
from ldm.config import schema as configuration
from ldm.training.cost import flops_of, size
from ldm.training.recipe import Start
from ldm.training.recipes.autoencoder import Schema
from ldm.training.run import build

PAGE = (Path(__file__).parent.parent.parent / "docs/configs.md").read_text(encoding="utf-8")


@pytest.fixture
def scenes():
    """The small first stage without memory."""
    return loop_of("scenes")


def loop_of(name):
    """The loop of a first stage that takes no memory."""
    return first_stage(ROOT / f"autoencoder/{name}.yaml")


def test_operations_are_those_of_a_real_loop(scenes):
    """In each phase of the game."""
    given = [*ONE, "trainer.precision=32-true"]
    real = build(configuration.load(ROOT / "autoencoder/scenes.yaml", given, Schema), {}, Start())
    real.trainer = real.settings.trainer([], real.recipe.sometimes_unused)
    counts = []
    for first in scenes.recipe.phases().values():
        real.counters.step = scenes.counters.step = first
        counts.append(operations(scenes))
        assert counts[-1] == flops_of(real)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("name", "moments"), [("scenes", 1), ("kl_f4", 2)])
def test_bytes_are_weights_gradients_moments_and_the_average(name, moments):
    """Muon has one moment, AdamW two."""
    loop = loop_of(name)
    recipe, cost = loop.recipe, cost_of(loop)
    numbers = {name: sum(p.numel() for _, p in group) for name, group in recipe.groups().items()}
    assert cost.trained == sum(numbers.values())
    learned = (1 + moments) * cost.trained + numbers[loop.main_group]
    assert cost.memory == size([*recipe.parameters(), *recipe.buffers()]) + 4 * learned


def test_the_page_has_every_configuration(scenes):
    assert PAGE.startswith(f"{HEAD}\n\n## ")
    names = {file.stem for folder in ("autoencoder", "ldm") for file in files(folder)}
    assert {file.stem for file in ROOT.glob("*/*.yaml") if file.parent.name in ("autoencoder", "ldm")} - names == {
        "finetune"
    }
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == names
    assert f"| {' | '.join(row('scenes', cost_of(scenes)))} |" in PAGE
