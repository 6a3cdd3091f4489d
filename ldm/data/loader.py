"""From a source of samples to batches, made ahead in worker processes."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ldm.data.sampler import Ask, Once, Order, Stream
from ldm.errors import LdmError


class Data(Protocol):
    """What the axis `data` builds; it is pickled once per worker, so it opens files late and maps what is large."""

    batch_size: int  # over all ranks and micro-batches
    workers: int
    buckets: NDArray | None  # of each sample which of `sizes` it has
    sizes: Sequence[tuple[int, int]]  # (H, W) of each bucket
    groups: NDArray | None  # of each sample the shard that it is read from

    def __len__(self) -> int: ...

    def batch(self, asks: Sequence[Ask], seed: int) -> dict[str, Any]: ...


class Batches(Dataset):
    """The data as a DataLoader sees them: asks in, a batch out, or the error written for its reader."""

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, asks: Sequence[Ask]) -> dict[str, Any] | LdmError:
        try:
            return self.data.batch(asks, self.seed)
        except LdmError as error:  # raised here, torch would bury its line in a traceback
            error.add_note(traceback.format_exc())
            return error


class Loader(DataLoader):
    """Batches of a Data in the order of a sampler, which yields the asks of one batch at a time."""

    def __init__(self, data: Data, seed: int, sampler: Iterable[list[Ask]]):
        workers: dict[str, Any] = {}
        if data.workers:
            # forked from a process that has no threads, locks or CUDA context of ours to inherit
            context = get_context("forkserver")
            context.set_forkserver_preload(["torch"])
            workers = {"multiprocessing_context": context, "persistent_workers": True, "worker_init_fn": settle}
        super().__init__(
            Batches(data, seed),
            batch_size=None,
            sampler=sampler,
            num_workers=data.workers,
            collate_fn=whole,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, LdmError):
                raise batch
            yield batch


def settle(worker: int) -> None:
    """A worker has one thread, and outlives the signals that ask training to save and stop."""
    torch.set_num_threads(1)
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, signal.SIG_IGN)


def whole(batch: Any) -> Any:
    return batch


def loader(data: Data, seed: int, *, position: int = 0, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> Loader:
    """This rank's micro-batches from `position` (samples seen) on, without end; `loader.sampler.position` may be set."""
    order = Order(len(data), data.batch_size, seed, data.buckets, data.groups)
    return Loader(data, seed, Stream(order, position=position, rank=rank, ranks=ranks, accumulate=accumulate))


def once(data: Data, seed: int, *, rank: int = 0, ranks: int = 1) -> Loader:
    """Each sample once, in the order of the source: for validation and for what is written to a cache."""
    return Loader(data, seed, Once(len(data), data.batch_size, data.buckets, rank, ranks))
