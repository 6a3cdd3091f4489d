"""From a Data to batches, which worker processes make and prepare ahead of time."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ldm.data.sampler import MicroBatches, Order, SampleId
from ldm.errors import LdmError

Prepare = Callable[[dict[str, Any]], dict[str, Any]]  # picklable: runs in the workers on each batch


class Data(Protocol):
    """What the axis `data` builds; each worker unpickles a copy, so files are opened late and large arrays mapped.

    Optional members: `kind` names what the samples are made of, `digest` identifies them, `captions(index)` gives a
    sample's captions without reading its picture, `validation()` gives the samples kept apart from training.
    """

    batch_size: int  # over all ranks and micro-batches
    workers: int
    buckets: NDArray | None  # (N,) index into `sizes`; None if all pictures have one size
    sizes: Sequence[tuple[int, int]]  # (H, W) of each bucket
    groups: NDArray | None  # (N,) shard that each sample is read from

    def __len__(self) -> int: ...

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """These samples, all of one bucket; `number` and `index` (B,) say which they are."""


def check_same_kind(data: Data, validation: Data | None) -> str:
    """A note if validation measures another kind of data than training learns from, else an empty text."""
    kinds = [getattr(source, "kind", type(source).__name__.lower()) for source in (data, validation or data)]
    if kinds[0] == kinds[1]:
        return ""
    hint = "data.split=0.05 and validation=null" if kinds[0] == "images" else f"validation.type={kinds[0]}"
    return f"validation: made of {kinds[1]}, but training uses {kinds[0]}; try {hint}"


class Batches(Dataset):
    """A Data as a DataLoader reads it: sample ids in, a prepared batch out, or the LdmError that stopped it."""

    def __init__(self, data: Data, seed: int, prepare: Prepare | None = None):
        self.data, self.seed, self.prepare = data, seed, prepare

    def __getitem__(self, sample_ids: Sequence[SampleId]) -> dict[str, Any] | LdmError:
        try:
            batch = self.data.batch(sample_ids, self.seed)
            return batch if self.prepare is None else self.prepare(batch)
        except LdmError as error:  # raised here, torch would bury its line in a traceback
            error.add_note(traceback.format_exc())
            return error


class Loader(DataLoader):
    """Batches of a Data; the sampler yields the sample ids of one batch at a time."""

    def __init__(self, data: Data, seed: int, sampler: Iterable[list[SampleId]], prepare: Prepare | None = None):
        workers: dict[str, Any] = {}
        if data.workers:
            workers = {"multiprocessing_context": worker_context(), "persistent_workers": True, "worker_init_fn": start}
        super().__init__(
            Batches(data, seed, prepare),
            batch_size=None,
            sampler=sampler,
            num_workers=data.workers,
            collate_fn=unchanged,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def check_worker_number_rationality(self) -> None:
        """No warning about more workers than cores: `data.workers` is the user's choice."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, LdmError):
                try:
                    raise batch
                finally:
                    del batch  # a cycle of error and frame would delay the workers' end until garbage collection
            yield batch


def worker_context() -> BaseContext:
    """Workers fork from a clean process that has none of our threads, locks and CUDA contexts and ignores SIGTERM."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    resource_tracker.ensure_running()  # otherwise the fork server starts it and unblocks signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start(worker: int) -> None:
    """One thread, and a session of its own: a signal to the training process's group does not stop its workers."""
    torch.set_num_threads(1)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Exit when the training process does; torch watches our parent by pid, which is the fork server."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def unchanged(batch: Any) -> Any:
    return batch


def loader(
    data: Data,
    seed: int,
    *,
    position: int = 0,
    rank: int = 0,
    ranks: int = 1,
    accumulate: int = 1,
    prepare: Prepare | None = None,
) -> Loader:
    """This rank's endless micro-batches from `position` (samples seen) on, each prepared where it is made."""
    order = Order(len(data), data.batch_size, seed, data.buckets, data.groups)
    sampler = MicroBatches(order, position=position, rank=rank, ranks=ranks, accumulate=accumulate)
    return Loader(data, seed, sampler, prepare)
