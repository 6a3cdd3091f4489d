"""Loading: the same samples whatever the ranks, workers and interruptions, and errors that keep their line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from collections import defaultdict
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.loader import Data, loader
from ldm.data.sampler import Order
from ldm.errors import DataError, InputError
from tests import waiting
from tests.data.numbered import Numbered


def expected(data: Data, batches: int) -> list[tuple[int, int]]:
    order = Order(len(data), data.batch_size, 5, data.buckets, data.groups)
    return [
        (sample_id.number, sample_id.index) for k in range(batches) for sample_id in order.batch(k * data.batch_size)
    ]


def read(data: Data, position: int, batches: int, ranks: int = 1, accumulate: int = 1) -> list[tuple[int, int]]:
    """What all ranks together make of so many global batches."""
    seen: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for rank in range(ranks):
        options = {"position": position, "rank": rank, "ranks": ranks, "accumulate": accumulate}
        for i, batch in enumerate(islice(loader(data, 5, **options), batches * accumulate)):
            seen[i // accumulate] += zip(batch["number"].tolist(), batch["index"].tolist())
    return [pair for k in range(batches) for pair in seen[k]]


def resumed(workers: list[int], ranks: list[int], buckets: np.ndarray | None = None) -> None:
    """Six stretches of one epoch, cut at random places, each with its own workers and ranks."""
    data = Numbered(length=160, batch_size=8, buckets=buckets)
    cuts = sorted(random.Random(0).sample(range(1, 20), 5))
    read_so_far: list[tuple[int, int]] = []
    for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 20])):
        data.workers = workers[i % len(workers)]
        read_so_far += read(data, 8 * start, stop - start, ranks[i % len(ranks)])
    assert read_so_far == expected(data, 20)
    assert sorted(index for _, index in read_so_far) == list(range(160))  # none missing, none twice


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_order_after_five_resumes(ranks):
    resumed([0], [ranks])


def test_the_same_order_when_each_resume_has_other_workers_and_ranks():
    resumed([2, 0, 4], [1, 4, 2])
    resumed([0, 2], [4, 1], buckets=np.arange(160) % 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_order_for_all_workers_and_ranks(workers, ranks):
    resumed([workers], [ranks])


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_join_to_the_global_batch(workers):
    data = Numbered(length=40, batch_size=8, workers=workers)
    assert read(data, 0, 4, ranks=2, accumulate=4) == expected(data, 4)


def test_a_batch_is_what_the_data_made_of_it():
    batch = next(iter(loader(Numbered(), 9)))
    assert set(batch) == {"number", "index", "bucket", "caption", "process", "threads"}
    assert batch["caption"] == [f"9: {index}" for index in batch["index"].tolist()]


class Doubled:
    """Preparation that says where it ran, and refuses one sample."""

    def __init__(self, bad: int = -1):
        self.bad = bad

    def __call__(self, batch: dict) -> dict:
        if self.bad in batch["index"]:
            raise DataError("the caption cannot be tokenised", f"{self.bad}.txt")
        return {**batch, "twice": 2 * batch["number"], "prepared_by": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_prepared_where_it_is_made(workers):
    batches = list(islice(loader(Numbered(workers=workers), 0, prepare=Doubled()), 4))
    for batch in batches:
        assert batch["twice"].tolist() == [2 * number for number in batch["number"].tolist()]
        assert batch["prepared_by"] == batch["process"]
    assert (os.getpid() in {batch["process"] for batch in batches}) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_preparation_keeps_its_line(workers):
    with pytest.raises(DataError, match=r"the caption cannot be tokenised \(17.txt\)") as caught:
        list(islice(loader(Numbered(workers=workers), 0, prepare=Doubled(17)), 6))
    assert "in __call__" in caught.value.__notes__[0]  # for --debug


def test_more_workers_than_cores_are_not_warned_about():
    with warnings.catch_warnings(action="error"):
        next(iter(loader(Numbered(workers=1 + (os.cpu_count() or 1)), 0)))


def test_the_position_is_set_before_each_iteration():
    loading = loader(Numbered(workers=2), 0)
    assert next(iter(loading))["number"][0] == 0
    loading.sampler.position = 16
    assert [batch["number"][0].item() for batch in islice(loading, 2)] == [16, 24]  # nothing left of what was ahead
    with pytest.raises(TypeError):
        len(loading)  # endless


# ------------------------------------------------------------------------------------------------ workers


def test_a_worker_has_one_thread_and_its_own_process():
    torch.set_num_threads(2)
    batches = list(islice(loader(Numbered(workers=2), 0), 4))
    assert {batch["threads"] for batch in batches} == {1}
    assert len({batch["process"] for batch in batches} - {os.getpid()}) == 2
    assert torch.get_num_threads() == 2


def first_error(data: Data) -> tuple[type, str, list[str]]:
    """What a reader meets; kept without its frames, as a program keeps it."""
    try:
        list(islice(loader(data, 0), 6))
    except Exception as error:
        return type(error), str(error), error.__notes__
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_keeps_its_line(workers, monkeypatch):
    """And ends the workers, of which none has to be killed."""
    terminated = []
    monkeypatch.setattr(BaseProcess, "terminate", terminated.append)
    kind, line, notes = first_error(Numbered(workers=workers, bad=17))
    assert (kind, line) == (DataError, "the picture changed since it was listed (17.jpg)")
    assert "numbered.py" in notes[0]  # for --debug
    assert terminated == []


def test_a_mistake_in_the_code_is_not_hidden(monkeypatch):
    data = Numbered()
    monkeypatch.setattr(data, "batch", lambda sample_ids, seed: {}["caption"], raising=True)
    with pytest.raises(KeyError):
        next(iter(loader(data, 0)))


def test_what_cannot_be_is_said_before_a_worker_starts():
    with pytest.raises(InputError):
        loader(Numbered(length=5, batch_size=8, workers=2), 0)
    with pytest.raises(InputError):
        loader(Numbered(length=50, batch_size=9, workers=2), 0, ranks=2)


PARENT = """
import signal, sys, time
from itertools import islice
from tests.data.numbered import Numbered
from ldm.data.loader import loader
if __name__ == "__main__":
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, lambda *_: None)
    batches = iter(loader(Numbered(length=400, workers=2), 0))
    print(*{batch["process"] for batch in islice(batches, 4)}, flush=True)
    sys.stdin.readline()
    print(*{batch["process"] for batch in islice(batches, 20)}, flush=True)
    sys.stdin.readline()
"""


def workers_of(line: str) -> list[int]:
    return sorted(map(int, line.split()))


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_end_with_their_parent_and_not_before(killed, tmp_path):
    """A scheduler or a terminal signals the whole group, and training still needs batches until it has saved."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], env=environment, **options) as parent:
        workers = workers_of(parent.stdout.readline())
        for request in (signal.SIGINT, signal.SIGTERM):
            os.killpg(parent.pid, request)
        parent.stdin.write("go on\n")
        parent.stdin.flush()
        assert workers_of(parent.stdout.readline()) == workers
        if killed:
            parent.kill()
    assert len(workers) == 2
    waiting.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
