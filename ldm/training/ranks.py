"""What processes tell each other beside gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from ldm.errors import CheckpointError
from ldm.training.statistics import Spread

T = TypeVar("T")
NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # what launchers number processes by


def among_others() -> bool:
    """Whether a launcher started this process, so that others may wait for it."""
    return any(name in os.environ for name in NUMBERS)


def gathered(said: T, spread: Spread) -> list[T]:
    """What every rank says, in their order; every rank calls."""
    everyone = [said] * spread.ranks
    if spread.ranks > 1:
        distributed.all_gather_object(everyone, said)
    return everyone


def together(find: Callable[[], T], spread: Spread) -> T:
    """What each process finds; where some cannot, all say why the first of them could not; every rank calls."""
    found: list[T] = []
    failure = ""
    try:
        found = [find()]
    except CheckpointError as error:
        failure = str(error)
    failures = gathered(failure, spread)
    for rank, text in enumerate(failures):
        if text:
            raise CheckpointError(text if spread.ranks == 1 else f"process {rank}: {text}")
    return found[0]


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
