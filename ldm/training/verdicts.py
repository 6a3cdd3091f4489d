"""The state of the game between autoencoder and discriminator, in plain words."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

WINDOW = 10  # rows of the log
OVERPOWERS, COLLAPSES = 6.0, 0.02  # mean distance between the logits of real and of reconstructed images
FALLS = 1e-3  # adaptive weight, as a part of the largest one seen


class Verdicts:
    """Watches the last rows of a log and speaks once when something has been wrong in all of them."""

    def __init__(self) -> None:
        self.gaps: deque[float] = deque(maxlen=WINDOW)
        self.said = ""

    def __call__(self, row: Mapping[str, float]) -> Iterator[str]:
        if "loss/logits_real" not in row:
            return
        self.gaps.append(row["loss/logits_real"] - row["loss/logits_fake"])
        verdict = judge(self.gaps) if len(self.gaps) == WINDOW else ""
        if verdict and verdict != self.said:
            yield f"step {row['step']:.0f}: {verdict}"
        self.said = verdict


def judge(gaps: deque[float]) -> str:
    """What the distances between real and fake logits say, or nothing."""
    if min(gaps) > OVERPOWERS:
        return (
            f"the discriminator overpowers the autoencoder (logits differ by {min(gaps):.1f} and more): it tells every "
            "reconstruction from its image; try a lower loss.adversarial_weight or a later loss.start"
        )
    if max(map(abs, gaps)) < COLLAPSES:
        return (
            f"the discriminator has collapsed (logits differ by less than {COLLAPSES}): it tells nothing apart, and "
            "the adversarial loss teaches nothing; try a higher optimizer.lr or discriminator.layers"
        )
    return ""
