"""Which samples make which batch: a function of the seed and the position, whatever the ranks and the workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.draws import mix32, stream
from ldm.errors import InputError

WINDOW = 8  # groups whose samples are mixed: enough to forget their order, few enough to read from


class SampleId(NamedTuple):
    """One sample to make: its number in the endless stream, which sample of the source it is, and its bucket."""

    number: int
    index: int  # type: ignore[assignment]  # a tuple's method of this name is not for us
    bucket: int


def hashed(seed: int, epoch: int, values: NDArray) -> NDArray[np.uint64]:
    """64 bits for each integer, no two alike, the same on every version and platform."""
    x = values.astype(np.uint64)
    x += np.uint64(mix32(seed, epoch) << 32)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(members: NDArray, seed: int, epoch: int, groups: NDArray | None = None) -> NDArray:
    """These members in the order of this epoch; groups are shuffled, then members within windows of a few groups."""
    order = members[np.argsort(hashed(stream(seed, "samples"), epoch, members))]
    if groups is None:
        return order
    shuffled = np.argsort(hashed(stream(seed, "groups"), epoch, np.arange(groups.max() + 1)))
    window = np.empty_like(shuffled)
    window[shuffled] = np.arange(len(shuffled)) // WINDOW
    return order[np.argsort(window[groups[order]], kind="stable")]


class Order:
    """An endless stream of global batches, each from one bucket, any of which is found without walking to it.

    S_b joins the permutations of bucket b's n_b members, epoch after epoch, and is cut into batches of B. Epoch e has
    those that end in its part of S_b, from floor(e n_b / B) to floor((e + 1) n_b / B): full ones, nothing dropped.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, buckets: NDArray | None = None, groups: NDArray | None = None
    ):
        if length < batch_size:
            least = f"at least {batch_size} samples"
            raise InputError("the set is smaller than one batch", "data.batch_size", str(length), least)
        self.length, self.batch_size, self.seed, self.groups = length, batch_size, seed, groups
        self.members = members_of(buckets, length)
        self.sizes = np.array([len(members) for members in self.members])
        self._permuted: dict[int, tuple[int, NDArray]] = {}  # of each bucket the epoch that is being read
        self._batches: tuple[int, NDArray, NDArray] = (-1, self.sizes, self.sizes)

    def batch(self, position: int) -> list[SampleId]:
        """The global batch that begins with this sample number."""
        bucket, start = self.locate(position)
        indices = self.members_at(bucket, start, start + self.batch_size)
        return [SampleId(position + i, index, bucket) for i, index in enumerate(indices.tolist())]

    def locate(self, position: int) -> tuple[int, int]:
        """The bucket b of the batch at this position, and where in S_b it begins."""
        if len(self.members) == 1:
            return 0, position
        k, beyond = divmod(position, self.batch_size)
        if beyond:
            where, whole = f"position {position}", f"a multiple of {self.batch_size} samples"
            raise InputError("batches of one size of picture cannot begin here", where, expected=whole)
        epoch = position // self.length  # has begun by then, as no epoch before it has more than length / B batches
        while self.batches_before(epoch + 1) <= k:
            epoch += 1
        buckets, nths = self.batches_of(epoch)
        i = k - self.batches_before(epoch)
        return int(buckets[i]), int(nths[i]) * self.batch_size

    def batches_before(self, epoch: int) -> int:
        return int((epoch * self.sizes // self.batch_size).sum())

    def batches_of(self, epoch: int) -> tuple[NDArray, NDArray]:
        """The batches of an epoch in order, as (bucket, place in S_b); each bucket's are spread evenly over it."""
        if self._batches[0] != epoch:
            first = epoch * self.sizes // self.batch_size
            counts = (epoch + 1) * self.sizes // self.batch_size - first
            bucket = np.repeat(np.arange(len(counts)), counts)
            nth = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
            u = (hashed(stream(self.seed, "batches"), epoch, np.arange(len(bucket))) >> np.uint64(11)) * 2.0**-53
            order = np.argsort((nth + u) / counts[bucket], kind="stable")
            self._batches = epoch, bucket[order], (first[bucket] + nth)[order]
        return self._batches[1:]

    def members_at(self, bucket: int, start: int, stop: int) -> NDArray:
        """S_b[start:stop]."""
        epochs, places = np.divmod(np.arange(start, stop), len(self.members[bucket]))
        return np.concatenate([self.permuted(bucket, int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def permuted(self, bucket: int, epoch: int) -> NDArray:
        held, order = self._permuted.get(bucket, (-1, self.sizes))
        if held != epoch:
            order = permutation(self.members[bucket], self.seed, epoch, self.groups)
            self._permuted[bucket] = epoch, order
        return order


def members_of(buckets: NDArray | None, length: int) -> list[NDArray]:
    """Of each bucket its samples, in the order of the source."""
    if buckets is None:
        return [np.arange(length)]
    return np.split(np.argsort(buckets, kind="stable"), np.cumsum(np.bincount(buckets))[:-1])


def by_bucket(indices: Iterable[int], size: int, buckets: NDArray | None) -> Iterator[list[SampleId]]:
    """Asks for these samples, numbered as in the source: bucket by bucket, at most `size` together."""
    sample_ids = [SampleId(index, index, 0 if buckets is None else int(buckets[index])) for index in indices]
    for _, same in groupby(sorted(sample_ids, key=attrgetter("bucket")), attrgetter("bucket")):
        together = list(same)
        yield from (together[start : start + size] for start in range(0, len(together), size))


def evenly_spaced(length: int, count: int) -> list[int]:
    """The places of so many samples at equal distances, or of all."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


class Stream:
    """One rank's part of an order from `position` (samples seen) on: its micro-batches of every global batch."""

    def __init__(self, order: Order, *, position: int = 0, rank: int = 0, ranks: int = 1, accumulate: int = 1):
        self.share, beyond = divmod(order.batch_size, ranks * accumulate)
        if beyond:
            parts = f"{order.batch_size} samples for {ranks} ranks with {accumulate} micro-batches each"
            whole = f"a multiple of {ranks * accumulate}"
            raise InputError("a batch cannot be split evenly", "data.batch_size", parts, whole)
        self.order, self.position = order, position
        self.begins = [(rank * accumulate + m) * self.share for m in range(accumulate)]
        order.locate(position)

    def __iter__(self) -> Iterator[list[SampleId]]:
        for position in count(self.position, self.order.batch_size):
            sample_ids = self.order.batch(position)
            yield from (sample_ids[begin : begin + self.share] for begin in self.begins)
