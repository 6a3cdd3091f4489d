"""What processes tell each other beside gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from torch import Tensor, distributed

from ldm.errors import CheckpointError

T = TypeVar("T")
NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # what launchers number processes by


class Rank(NamedTuple):
    """Which of how many processes this is."""

    number: int = 0
    of: int = 1


def among_others() -> bool:
    """Whether a launcher started this process, so that others may wait for it."""
    return any(name in os.environ for name in NUMBERS)


def shared(count: int, rank: Rank) -> Iterator[tuple[int, bool]]:
    """This rank's of so many batches, each with whether it counts.

    Those that do not are there because sharded networks want equally many on every rank.
    """
    for start in range(0, count, rank.of):
        yield min(start + rank.number, count - 1), start + rank.number < count


def summed(x: Tensor, rank: Rank) -> Tensor:
    """The sum over ranks, in place; every rank calls."""
    if rank.of > 1:
        distributed.all_reduce(x)
    return x


def gathered(said: T, rank: Rank) -> list[T]:
    """What every rank says, in their order; every rank calls."""
    everyone = [said] * rank.of
    if rank.of > 1:
        distributed.all_gather_object(everyone, said)
    return everyone


def together(find: Callable[[], T], rank: Rank) -> T:
    """What each process finds; where some cannot, all say why the first of them could not; every rank calls."""
    found: list[T] = []
    failure = ""
    try:
        found = [find()]
    except CheckpointError as error:
        failure = str(error)
    failures = gathered(failure, rank)
    for number, text in enumerate(failures):
        if text:
            raise CheckpointError(text if rank.of == 1 else f"process {number}: {text}")
    return found[0]


def by_first(write: Callable[[], None], rank: Rank) -> None:
    """Have the first process write; where it fails all do, or the others would wait for it; every rank calls."""
    failure: Exception | None = None
    if rank.number == 0:
        try:
            write()
        except Exception as error:
            failure = error
    said = gathered(failure and str(failure), rank)[0]
    if failure:
        raise failure
    if said is not None:
        raise CheckpointError(f"the first process could not write: {said}")
