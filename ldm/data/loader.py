"""From a source of samples to batches, made ahead in worker processes."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ldm.data.sampler import Order, SampleId, Stream
from ldm.errors import LdmError


class Data(Protocol):
    """What the axis `data` builds; it is pickled once per worker, so it opens files late and maps what is large.

    One may also have a `digest`, a text that tells its samples from any others.
    """

    batch_size: int  # over all ranks and micro-batches
    workers: int
    buckets: NDArray | None  # of each sample which of `sizes` it has
    sizes: Sequence[tuple[int, int]]  # (H, W) of each bucket
    groups: NDArray | None  # of each sample the shard that it is read from

    def __len__(self) -> int: ...

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]: ...


class Batches(Dataset):
    """The data as a DataLoader sees them: asks in, a batch out, or the error written for its reader."""

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, sample_ids: Sequence[SampleId]) -> dict[str, Any] | LdmError:
        try:
            return self.data.batch(sample_ids, self.seed)
        except LdmError as error:  # raised here, torch would bury its line in a traceback
            error.add_note(traceback.format_exc())
            return error


class Loader(DataLoader):
    """Batches of a Data in the order of a sampler, which yields the asks of one batch at a time."""

    def __init__(self, data: Data, seed: int, sampler: Iterable[list[SampleId]]):
        workers: dict[str, Any] = {}
        if data.workers:
            workers = {"multiprocessing_context": nursery(), "persistent_workers": True, "worker_init_fn": settle}
        super().__init__(
            Batches(data, seed),
            batch_size=None,
            sampler=sampler,
            num_workers=data.workers,
            collate_fn=unchanged,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, LdmError):
                try:
                    raise batch
                finally:
                    del batch  # a cycle of error and frame would leave the end of the workers to the collector
            yield batch


def nursery() -> BaseContext:
    """Workers are forked from a process without our threads, locks and CUDA contexts, which a SIGTERM to all spares."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    resource_tracker.ensure_running()  # else started below, where it would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def settle(worker: int) -> None:
    """A worker has one thread, and a session of its own: who asks training to save and stop does not ask it."""
    torch.set_num_threads(1)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=follow, daemon=True).start()


def follow() -> None:
    """End with the process that the batches are for; torch would look at the one that forked us, which waits for us."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def unchanged(batch: Any) -> Any:
    return batch


def loader(data: Data, seed: int, *, position: int = 0, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> Loader:
    """This rank's micro-batches from `position` (samples seen) on, for ever; `loader.sampler.position` may be set."""
    order = Order(len(data), data.batch_size, seed, data.buckets, data.groups)
    return Loader(data, seed, Stream(order, position=position, rank=rank, ranks=ranks, accumulate=accumulate))
