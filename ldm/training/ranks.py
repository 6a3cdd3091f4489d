"""What processes tell each other beside gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from ldm.errors import CheckpointError
from ldm.training.statistics import Spread

T = TypeVar("T")


def gathered(said: T, spread: Spread) -> list[T]:
    """What every rank says, in their order; every rank calls."""
    everyone = [said] * spread.ranks
    if spread.ranks > 1:
        distributed.all_gather_object(everyone, said)
    return everyone


def by_first(write: Callable[[], None], spread: Spread) -> None:
    """Have the first process write; where it fails all do, or the others would wait for it; every rank calls."""
    failure: Exception | None = None
    if spread.rank == 0:
        try:
            write()
        except Exception as error:
            failure = error
    said = gathered(failure and str(failure), spread)[0]
    if failure:
        raise failure
    if said is not None:
        raise CheckpointError(f"the first process could not write: {said}")
