"""Which samples make which batch: a function of seed and position, whatever the ranks and the workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.draws import mix32, stream
from ldm.errors import InputError

WINDOW = 8  # groups whose samples are mixed: enough to hide their order, few enough to read from


class SampleId(NamedTuple):
    """A sample to make: its number in the endless order, its index in the source, and its bucket."""

    number: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    bucket: int


def hashed(seed: int, epoch: int, values: NDArray) -> NDArray[np.uint64]:
    """64 bits for each integer, different for different integers, the same on every version and platform."""
    x = values.astype(np.uint64)
    x += np.uint64(mix32(seed, epoch) << 32)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(members: NDArray, seed: int, epoch: int, groups: NDArray | None = None) -> NDArray:
    """An epoch's order of these members; groups are shuffled, then members within windows of a few groups."""
    order = members[np.argsort(hashed(stream(seed, "samples"), epoch, members))]
    if groups is None:
        return order
    shuffled = np.argsort(hashed(stream(seed, "groups"), epoch, np.arange(groups.max() + 1)))
    window = np.empty_like(shuffled)
    window[shuffled] = np.arange(len(shuffled)) // WINDOW
    return order[np.argsort(window[groups[order]], kind="stable")]


class Order:
    """An endless order of global batches, each from one bucket; any of them is found without walking to it.

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
        self._permuted: dict[int, tuple[int, NDArray]] = {}  # each bucket's current epoch and its order
        self._batches: tuple[int, NDArray, NDArray] = (-1, self.sizes, self.sizes)

    def batch(self, position: int) -> list[SampleId]:
        """The global batch that begins with this sample number."""
        bucket, start = self.locate(position)
        indices = self.members_at(bucket, start, start + self.batch_size)
        return [SampleId(position + i, index, bucket) for i, index in enumerate(indices.tolist())]

    def locate(self, position: int) -> tuple[int, int]:
        """The bucket b of the batch at this position, and its start in S_b."""
        if len(self.members) == 1:
            return 0, position
        k, rest = divmod(position, self.batch_size)
        if rest:
            multiple = f"a multiple of {self.batch_size} samples"
            raise InputError("position is not a multiple of the batch size", f"position {position}", expected=multiple)
        epoch = position // self.length  # has begun by then: earlier epochs have at most length / B batches each
        while self.batches_before(epoch + 1) <= k:
            epoch += 1
        buckets, nths = self.batches_of(epoch)
        i = k - self.batches_before(epoch)
        return int(buckets[i]), int(nths[i]) * self.batch_size

    def batches_before(self, epoch: int) -> int:
        return int((epoch * self.sizes // self.batch_size).sum())

    def batches_of(self, epoch: int) -> tuple[NDArray, NDArray]:
        """An epoch's batches in order, as (bucket, place in S_b); each bucket's are spread evenly over the epoch."""
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
        known, order = self._permuted.get(bucket, (-1, self.sizes))
        if known != epoch:
            order = permutation(self.members[bucket], self.seed, epoch, self.groups)
            self._permuted[bucket] = epoch, order
        return order


class MicroBatches:
    """One rank's micro-batches of every global batch of an order, from `position` (samples seen) on."""

    def __init__(self, order: Order, *, position: int = 0, rank: int = 0, ranks: int = 1, accumulate: int = 1):
        self.size, rest = divmod(order.batch_size, ranks * accumulate)
        if rest:
            parts = f"{order.batch_size} samples for {ranks} ranks with {accumulate} micro-batches each"
            multiple = f"a multiple of {ranks * accumulate}"
            raise InputError("a batch cannot be split evenly", "data.batch_size", parts, multiple)
        self.order, self.position = order, position
        self.starts = [(rank * accumulate + m) * self.size for m in range(accumulate)]
        order.locate(position)  # refuses a position inside a batch

    def __iter__(self) -> Iterator[list[SampleId]]:
        for position in count(self.position, self.order.batch_size):
            sample_ids = self.order.batch(position)
            yield from (sample_ids[start : start + self.size] for start in self.starts)


def members_of(buckets: NDArray | None, length: int) -> list[NDArray]:
    """Each bucket's samples, in the order of the source."""
    if buckets is None:
        return [np.arange(length)]
    return np.split(np.argsort(buckets, kind="stable"), np.cumsum(np.bincount(buckets))[:-1])


def by_bucket(indices: Iterable[int], size: int, buckets: NDArray | None) -> Iterator[list[SampleId]]:
    """Ids of these samples, numbered as in the source, in batches of one bucket and at most `size`."""
    sample_ids = [SampleId(index, index, 0 if buckets is None else int(buckets[index])) for index in indices]
    for _, group in groupby(sorted(sample_ids, key=attrgetter("bucket")), attrgetter("bucket")):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` indices at equal distances, or all."""
    count = min(count, length)
    return [i * length // count for i in range(count)]
