"""Work that torchrun's processes share: each does every n-th batch, and all of them get the rows of all, in order."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm import tqdm

T = TypeVar("T")
Rows = dict[str, Any]  # by name a tensor (B, ...) or a list


def rank() -> int:
    """Which of torchrun's processes this is."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def shared(batches: Sequence[T], work: Callable[[T], Rows], what: str) -> Rows:
    """work(batch) of all batches, joined; `what` names the bar that the first process shows."""
    mine = range(rank(), len(batches), ranks())
    quiet = None if rank() == 0 else True
    done = {number: work(batches[number]) for number in tqdm(mine, desc=what, disable=quiet, leave=False)}
    done = {number: rows for part in gathered(done) for number, rows in part.items()}
    found = [done[number] for number in range(len(batches))]
    return {name: joined([rows[name] for rows in found]) for name in found[0]} if found else {}


def told(value: T) -> T:
    """What the first process has, on all of them."""
    if ranks() == 1:
        return value
    together()
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def together() -> None:
    """Let the processes find one another, once."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # or its threads may outlive the interpreter, and abort


def gathered(value: T) -> list[T]:
    """What every process has, on all of them."""
    if ranks() == 1:
        return [value]
    together()
    parts: list[Any] = [None] * ranks()
    distributed.all_gather_object(parts, value)
    return parts


def joined(parts: list[Any]) -> Any:
    """Rows one below the other."""
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [row for part in parts for row in part]
