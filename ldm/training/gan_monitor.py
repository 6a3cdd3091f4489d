"""The state of the game between autoencoder and discriminator, in plain words."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

WINDOW = 10  # rows of the log
OVERPOWERS = 0.05  # the discriminator's loss, of either kind, below which it is never wrong
COLLAPSES = 0.02  # mean distance between the logits of real and of reconstructed images


class GanMonitor:
    """Watches the last rows of a log and speaks once when something has been wrong in all of them."""

    def __init__(self) -> None:
        self.rows: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self.said = ""

    def __call__(self, row: Mapping[str, float]) -> Iterator[str]:
        if "loss/logits_real" not in row:
            return
        self.rows.append(row)
        verdict = judge(self.rows) if len(self.rows) == WINDOW else ""
        if verdict and verdict != self.said:
            yield f"step {row['step']:.0f}: {verdict}"
        self.said = verdict


def judge(rows: Iterable[Mapping[str, float]]) -> str:
    """What the discriminator's losses and logits say, or nothing."""
    losses = [row["loss/discriminator"] for row in rows]
    gaps = [abs(row["loss/logits_real"] - row["loss/logits_fake"]) for row in rows]
    if max(losses) < OVERPOWERS:
        return (
            f"the discriminator overpowers the autoencoder (its loss is at most {max(losses):.2g}): it recognises "
            "every reconstruction; try a lower discriminator_optimizer.lr or a later loss.start"
        )
    if max(gaps) < COLLAPSES:
        return (
            f"the discriminator has collapsed (logits differ by less than {COLLAPSES}): it cannot tell images from "
            "reconstructions, so the adversarial loss has no effect; try another discriminator_optimizer.lr"
        )
    return ""
