"""What processes tell each other beside gradients."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

from ldm.training.statistics import Spread

T = TypeVar("T")


def gathered(said: T, spread: Spread) -> list[T]:
    """What every rank says, in their order; every rank calls."""
    everyone = [said] * spread.ranks
    if spread.ranks > 1:
        distributed.all_gather_object(everyone, said)
    return everyone
