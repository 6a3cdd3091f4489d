"""A run that is killed and started again is the run that was not, bit for bit."""

from __future__ import annotations

import pytest

from ldm.data.sampler import Order
from tests.training.killing import assert_same_after_kills, toy_data

__all__ = ["toy_data"]


@pytest.mark.long
def test_killed_twice_in_accumulation(tmp_path):
    assert_same_after_kills(tmp_path, 2, ["trainer.accumulate=4"], steps=40)


def test_killed_once_with_muon(tmp_path):
    assert_same_after_kills(tmp_path, 1, ["optimizer={type: muon, lr: 1e-3}"], steps=30)


def test_killed_once_with_an_optimiser_that_counts_in_python(tmp_path):
    assert_same_after_kills(tmp_path, 1, ["optimizer={type: counting, lr: 1e-3}"], steps=30)


@pytest.mark.slow
def test_killed_ten_times_with_workers_and_accumulation(tmp_path):
    assert_same_after_kills(tmp_path, 10, ["trainer.accumulate=4", "data.workers=2"], steps=200)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_killed_three_times(workers, accumulate, tmp_path):
    assert_same_after_kills(tmp_path, 3, [f"data.workers={workers}", f"trainer.accumulate={accumulate}"])


@pytest.mark.slow
def test_killed_three_times_on_two_processes(tmp_path):
    assert_same_after_kills(tmp_path, 3, ["data.workers=0"], ranks=2)


def test_the_epochs_differ():
    """Or a resume at the beginning of an epoch would pass for a resume in its middle."""
    order = Order(40, 8, 3)
    epochs = [
        [sample_id.index for k in range(5) for sample_id in order.batch(40 * epoch + 8 * k)] for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]
