"""The order: a hash done twice, a naive walk beside the closed form, and every sample exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from ldm.data.sampler import WINDOW, MicroBatches, Order, SampleId, by_bucket, hashed, permutation
from ldm.draws import mix32
from ldm.errors import InputError

MANY = 2**64 - 1


def indices(sample_ids: list[SampleId]) -> list[int]:
    return [sample_id.index for sample_id in sample_ids]


def joined(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def walk(order: Order, batches: int) -> list[list[SampleId]]:
    return [order.batch(k * order.batch_size) for k in range(batches)]


# ------------------------------------------------------------------------------------------------ permutations


def slow_hash(seed: int, epoch: int, value: int) -> int:
    """The same in Python's integers."""
    x = (value + (mix32(seed, epoch) << 32)) * 0x9E3779B97F4A7C15 & MANY
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MANY
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MANY
    return x ^ x >> 31


@given(st.integers(0, 2**32), st.integers(0, 2**40), st.lists(st.integers(0, 2**50), max_size=5))
def test_the_hash_is_what_integers_make_it(seed, epoch, values):
    hashes = hashed(seed, epoch, np.array(values, dtype=np.int64))
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [slow_hash(seed, epoch, value) for value in values]


@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 1000))
def test_a_permutation_has_each_member_once(length, seed, epoch):
    members = np.arange(length) * 3
    assert sorted(permutation(members, seed, epoch)) == members.tolist()


def test_every_index_comes_to_every_place_alike():
    length, epochs = 12, 6000
    orders = np.stack([permutation(np.arange(length), 5, epoch) for epoch in range(epochs)])
    table = np.stack([np.bincount(place, minlength=length) for place in orders.T])
    assert chisquare(table.ravel(), ddof=2 * length - 2).pvalue > 0.001
    rises = (np.diff(orders, axis=1) > 0).mean()  # a neighbour knows nothing of the one before
    assert abs(rises - 0.5) < 0.01
    same = (orders[1:] == orders[:-1]).sum(1).mean()  # nor an epoch of the one before: one fixed point on average
    assert abs(same - 1) < 0.05


def test_seeds_and_epochs_are_different_orders():
    orders = [tuple(permutation(np.arange(50), seed, epoch)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100


# ------------------------------------------------------------------------------------------------ plain order


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 200))
def test_numbers_and_epochs(length, batch_size, position):
    if batch_size > length:
        return
    for i, sample_id in enumerate(Order(length, batch_size, 3).batch(position)):
        epoch, place = divmod(position + i, length)
        assert sample_id == (position + i, permutation(np.arange(length), 3, epoch)[place], 0)


def test_each_epoch_has_all_and_no_two_are_alike():
    order = Order(40, 8, 0)
    epochs = [joined(indices(order.batch(e * 40 + k * 8)) for k in range(5)) for e in range(4)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert indices(Order(40, 8, 1).batch(0)) != epochs[0][:8]


def test_any_place_is_reached_without_walking_and_backwards():
    order = Order(1000, 10, 0)
    far = order.batch(10**15)
    assert indices(order.batch(5)) == indices(Order(1000, 10, 0).batch(5))
    assert far == Order(1000, 10, 0).batch(10**15)
    assert type(far[0].number) is type(far[0].index) is int


# ------------------------------------------------------------------------------------------------ groups


def test_a_stretch_is_read_from_few_groups():
    groups = np.repeat(np.arange(60), 20)
    order = Order(1200, 40, 0, groups=groups)
    read = np.concatenate([indices(order.batch(k * 40)) for k in range(30)])
    assert sorted(read) == list(range(1200))
    whole = groups[read].reshape(-1, WINDOW // 2 * 20)  # half a window
    assert max(len(set(part)) for part in whole) <= WINDOW
    assert min(len(set(part)) for part in whole[:-1]) == WINDOW  # and it is mixed
    assert (np.diff(groups[read]) != 0).mean() > 0.8
    first, second = (set(groups[indices(order.batch(e * 1200))]) for e in (0, 1))
    assert first != second  # other groups meet in the next epoch


def test_groups_change_the_order_within_a_bucket_only():
    buckets, groups = np.arange(600) % 3, np.repeat(np.arange(60), 10)
    order = Order(600, 20, 0, buckets, groups)
    batches = walk(order, 30)
    assert sorted(joined(map(indices, batches))) == list(range(600))
    assert max(len(set(groups[indices(batch)])) for batch in batches) <= WINDOW + WINDOW


# ------------------------------------------------------------------------------------------------ buckets

some_buckets = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


def naive(buckets: np.ndarray, batch_size: int, seed: int, epochs: int) -> list[list[tuple[int, list[int]]]]:
    """Of each epoch its batches as (bucket, indices): samples drop into their bucket's box, full boxes go out."""
    boxes: dict[int, list[int]] = {int(b): [] for b in buckets}
    out: list[list[tuple[int, list[int]]]] = [[] for _ in range(epochs)]
    for epoch in range(epochs):
        for bucket, box in boxes.items():
            for index in permutation(np.flatnonzero(buckets == bucket), seed, epoch):
                box.append(int(index))
                if len(box) == batch_size:
                    out[epoch].append((bucket, box.copy()))
                    box.clear()
    return out


@given(some_buckets, st.integers(1, 12), st.integers(0, 5))
def test_the_closed_form_is_the_naive_walk(buckets, batch_size, seed):
    if batch_size > len(buckets):
        return
    order, k = Order(len(buckets), batch_size, seed, buckets), 0
    for epoch, expected in enumerate(naive(buckets, batch_size, seed, 5)):
        assert order.batches_before(epoch) == k
        batches = [order.batch((k + i) * batch_size) for i in range(len(expected))]
        seen = [(batch[0].bucket, indices(batch)) for batch in batches]
        assert sorted(seen) == sorted(expected)
        for bucket in set(buckets.tolist()):  # and within a bucket in the order of its stream
            assert [one for one in seen if one[0] == bucket] == [one for one in expected if one[0] == bucket]
        assert all(len({sample_id.bucket for sample_id in batch}) == 1 for batch in batches)
        k += len(expected)


@given(some_buckets, st.integers(1, 12), st.lists(st.integers(0, 400), min_size=1, max_size=5))
def test_a_bucketed_order_is_found_from_anywhere(buckets, batch_size, places):
    if batch_size > len(buckets):
        return
    walked = walk(Order(len(buckets), batch_size, 1, buckets), max(places) + 1)
    assert [sample_id.number for batch in walked for sample_id in batch] == list(range(len(walked) * batch_size))
    order = Order(len(buckets), batch_size, 1, buckets)
    for k in places:
        assert order.batch(k * batch_size) == walked[k]


def test_batches_of_a_bucket_are_spread_over_the_epoch():
    buckets = np.repeat([0, 1], [900, 100])
    order = Order(1000, 10, 0, buckets)
    rare = [np.flatnonzero(order.batches_of(e)[0] == 1) for e in range(50)]
    assert all(
        ((at >= k * 10 - 2) & (at < k * 10 + 12)).all() for places in rare for k, at in enumerate(places[:, None])
    )
    assert len({tuple(places) for places in rare}) == 50


def test_one_bucket_is_no_bucket():
    assert walk(Order(37, 5, 0, np.zeros(37, dtype=int)), 20) == walk(Order(37, 5, 0), 20)
    holes = walk(Order(37, 5, 0, np.full(37, 2)), 20)  # the others are empty
    assert [indices(batch) for batch in holes] == [indices(batch) for batch in walk(Order(37, 5, 0), 20)]


# ------------------------------------------------------------------------------------------------ ranks


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100), st.booleans())
def test_ranks_and_micro_batches_join_to_the_global_batch(ranks, accumulate, share, begin, bucketed):
    batch_size = ranks * accumulate * share
    length = 2 * batch_size + 1
    order = Order(length, batch_size, 7, np.arange(length) % 2 if bucketed else None)
    position = begin * batch_size if bucketed else begin
    options = {"position": position, "ranks": ranks, "accumulate": accumulate}
    streams = [iter(MicroBatches(order, rank=rank, **options)) for rank in range(ranks)]
    for k in range(3):
        parts = [part for stream in streams for part in islice(stream, accumulate)]
        assert {len(part) for part in parts} == {share}
        assert joined(parts) == order.batch(position + k * batch_size)


def test_a_stream_begins_where_it_is_told():
    stream = MicroBatches(Order(40, 8, 0))
    stream.position = 24
    assert next(iter(stream))[0].number == 24
    assert next(iter(stream))[0].number == 24  # iterating does not move it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Order(7, 8, 0),
            "the set is smaller than one batch (data.batch_size); got 7; expected at least 8 samples",
        ),
        (
            lambda: MicroBatches(Order(40, 10, 0), ranks=2, accumulate=4),
            "a batch cannot be split evenly (data.batch_size); got 10 samples for 2 ranks with 4 micro-batches each; "
            "expected a multiple of 8",
        ),
        (
            lambda: MicroBatches(Order(40, 10, 0, np.arange(40) % 2), position=15),
            "position is not a multiple of the batch size (position 15); expected a multiple of 10 samples",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


def test_a_plain_order_may_begin_anywhere():
    assert [sample_id.number for sample_id in next(iter(MicroBatches(Order(40, 10, 0), position=15)))] == list(
        range(15, 25)
    )


# ------------------------------------------------------------------------------------------------ once


def test_samples_are_grouped_by_bucket_and_keep_their_order():
    assert list(by_bucket(range(5), 3, None)) == [
        [SampleId(i, i, 0) for i in range(3)],
        [SampleId(3, 3, 0), SampleId(4, 4, 0)],
    ]
    groups = list(by_bucket([1, 2, 4, 5, 7, 8, 9], 2, np.arange(10) % 3))
    assert [(group[0].bucket, indices(group)) for group in groups] == [
        (0, [9]),
        (1, [1, 4]),
        (1, [7]),
        (2, [2, 5]),
        (2, [8]),
    ]
    assert all(
        sample_id.number == sample_id.index and sample_id.bucket == group[0].bucket
        for group in groups
        for sample_id in group
    )
