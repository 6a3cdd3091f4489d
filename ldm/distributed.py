"""Collectives: what processes exchange beside gradients, in a group that Lightning made or one made on demand."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from ldm.errors import CheckpointError

T = TypeVar("T")
Rows = dict[str, Any]  # name -> tensor (B, ...) or list of length B
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # set by launchers


class Rank(NamedTuple):
    """The number of this process and how many there are."""

    number: int = 0
    of: int = 1


def torchrun_rank() -> Rank:
    """This process's rank under torchrun; 0 of 1 without it."""
    return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def launched() -> bool:
    """True if a launcher started this process, so that others may wait for it."""
    return any(name in os.environ for name in RANK_VARIABLES)


# ------------------------------------------------------------------------------- every rank calls the functions below


def ensure_group() -> None:
    """Make a gloo group if there is no group yet."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else its threads may outlive the interpreter and abort


def sum_over_ranks(x: Tensor, rank: Rank) -> Tensor:
    """Sum `x` over ranks, in place."""
    if rank.of > 1:
        ensure_group()
        distributed.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor, rank: Rank) -> Tensor:
    """Average `x` over ranks, in place."""
    return sum_over_ranks(x, rank).div_(rank.of)


def gather_rows(rows: Tensor, rank: Rank) -> Tensor:
    """The rows (N, ...) of all ranks, in the order of ranks; every rank has equally many."""
    if rank.of == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(rank.of)]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def full(x: Tensor) -> Tensor:
    """A tensor in one piece, gathered if FSDP2 has sharded it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def full_state(tensors: Mapping[str, Tensor], rank: Rank) -> dict[str, Tensor]:
    """CPU copies of tensors, gathered from all ranks; the first rank gets them."""
    state = {}
    for name, x in tensors.items():
        x = full(x.detach())
        if rank.number == 0:
            state[name] = x.to("cpu", copy=True)
    return state


def gather(value: T, rank: Rank) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    values = [value] * rank.of
    if rank.of > 1:
        ensure_group()
        distributed.all_gather_object(values, value)
    return values


def broadcast(value: T, rank: Rank) -> T:
    """The first rank's value, on every rank."""
    values = [value]
    if rank.of > 1:
        ensure_group()
        distributed.broadcast_object_list(values)
    return values[0]


def all_or_none(find: Callable[[], T], rank: Rank) -> T:
    """find(); if it raises a CheckpointError on any rank, every rank raises the first of them."""
    found: list[T] = []
    failure = ""
    try:
        found = [find()]
    except CheckpointError as error:
        failure = str(error)
    for number, text in enumerate(gather(failure, rank)):
        if text:
            raise CheckpointError(text if rank.of == 1 else f"process {number}: {text}")
    return found[0]


def first_process(write: Callable[[], None], rank: Rank) -> None:
    """Run write() on the first process; if it fails there, every process raises, so that none waits for it."""
    failure: Exception | None = None
    if rank.number == 0:
        try:
            write()
        except Exception as error:
            failure = error
    message = gather(failure and str(failure), rank)[0]
    if failure:
        raise failure
    if message is not None:
        raise CheckpointError(f"the first process could not write: {message}")


def share_batches(count: int, rank: Rank) -> Iterator[tuple[int, bool]]:
    """This rank's share of `count` batches: (index, whether it counts).

    Sharded networks need the same number of batches on every rank; the surplus ones do not count.
    """
    for start in range(0, count, rank.of):
        yield min(start + rank.number, count - 1), start + rank.number < count


def map_batches(batches: Sequence[T], work: Callable[[T], Rows], rank: Rank, title: str) -> Rows:
    """work(batch) of every rank.of-th batch; every rank gets the rows of all batches, in order."""
    from tqdm import tqdm

    mine = range(rank.number, len(batches), rank.of)
    quiet = None if rank.number == 0 else True  # None: quiet unless in a terminal
    done = {number: work(batches[number]) for number in tqdm(mine, desc=title, disable=quiet, leave=False)}
    done = {number: rows for part in gather(done, rank) for number, rows in part.items()}
    found = [done[number] for number in range(len(batches))]
    return {name: concatenate([rows[name] for rows in found]) for name in found[0]} if found else {}


def concatenate(parts: Sequence[Any]) -> Any:
    """Tensors or lists of several batches as one."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]
