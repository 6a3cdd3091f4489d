"""What is said of the game, and when."""

from __future__ import annotations

import pytest

from ldm.training.gan_monitor import WINDOW, GanMonitor


def said(loss: float, gap: float, rows: int = 3 * WINDOW) -> list[str]:
    """All verdicts on a game that goes on like this."""
    watch = GanMonitor()
    row = {"loss/discriminator": loss, "loss/logits_real": gap, "loss/logits_fake": 0.0}
    return [line for step in range(rows) for line in watch({**row, "step": step})]


@pytest.mark.parametrize(
    ("loss", "gap", "words"), [(0.01, 3.0, "overpowers the autoencoder"), (1.0, 0.001, "has collapsed")]
)
def test_a_bad_game_is_named_once_after_a_while(loss, gap, words):
    (line,) = said(loss, gap)
    assert words in line
    assert line.startswith(f"step {WINDOW - 1}: ")
    assert said(loss, gap, rows=WINDOW - 1) == []


def test_nothing_is_said_of_a_good_game_or_of_none():
    assert said(0.7, 0.5) == []
    assert list(GanMonitor()({"loss/loss": 1.0, "step": 3})) == []
