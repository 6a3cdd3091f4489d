"""Collectives between processes that torchrun started: shared work comes back complete and in order on all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import distributed
from ldm.errors import CheckpointError
from ldm.metrics.comparison import ReferenceSet, reference_features
from ldm.scenes import Scenes
from ldm.scenes.features import JudgeFeatures
from tests import forking


def run(folder: Path, work: Callable[[], Any], ranks: int) -> list[Any]:
    """What each of so many processes returns."""
    files = [folder / f"{i}.json" for i in range(ranks)]
    logs = [file.with_suffix(".log") for file in files]
    works = [partial(write, file, work) for file in files]
    assert forking.wait(forking.ranks(works, logs)) == [0] * ranks, [log.read_text() for log in logs]
    return [json.loads(file.read_text()) for file in files]


def write(file: Path, work: Callable[[], Any]) -> int:
    """Write what the work returns."""
    file.write_text(json.dumps(work()))
    return 0


def features(cache: Path, apart: bool = False) -> list[list[list[float]]]:
    """Features of three sets of true pictures, the third of which is the first again; cached in a folder."""
    os.environ["XDG_CACHE_HOME"] = f"{cache}{os.environ.get('RANK', 0) if apart else ''}"
    data = Scenes(resolution=64, batch_size=2, size=100, workers=0)
    sets = [ReferenceSet(data, {}, range(k, k + 5), 0) for k in (0, 5, 0)]
    return [reference_features(JudgeFeatures(), each)["vectors"].tolist() for each in sets]


def test_features_are_those_of_one_process_where_only_one_has_kept_some(tmp_path):
    """On nodes with folders of their own, the first one's decides."""
    apart = partial(features, tmp_path / "cache", apart=True)
    (alone,) = run(tmp_path, apart, 1)  # the first process's folder is filled now
    assert run(tmp_path, apart, 2) == [alone, alone]
    assert run(tmp_path, partial(features, tmp_path / "fresh"), 2) == [alone, alone]


def shared_work() -> dict[str, Any]:
    """Five pieces of work: those that this process did, and the results of all."""
    mine: list[int] = []

    def work(k: int) -> dict[str, Any]:
        mine.append(k)
        return {"x": torch.full((k,), k), "words": [f"{k}{i}" for i in range(k)]}

    rows = distributed.map_batches([1, 2, 3, 4, 5], work, distributed.torchrun_rank(), "work")
    return {"mine": mine, "x": rows["x"].tolist(), "words": rows["words"]}


def test_two_processes_find_what_one_finds(tmp_path):
    found = {ranks: run(tmp_path, shared_work, ranks) for ranks in (1, 2)}
    assert [each.pop("mine") for each in found[2]] == [[1, 3, 5], [2, 4]]
    assert found[1][0].pop("mine") == [1, 2, 3, 4, 5]
    assert found[2][0] == found[2][1] == found[1][0]
    assert found[1][0]["words"][:3] == ["10", "20", "21"]


def fails() -> None:
    raise CheckpointError("no such file")


def collectives() -> dict[str, Any]:
    """What each collective returns or raises here."""
    rank, errors = distributed.torchrun_rank(), []
    last = fails if rank.number == rank.of - 1 else lambda: None
    for call in (partial(distributed.all_or_none, last, rank), partial(distributed.first_process, fails, rank)):
        with pytest.raises(CheckpointError) as error:
            call()
        errors.append(str(error.value))
    return {
        "gather": distributed.gather(rank.number, rank),
        "broadcast": distributed.broadcast(f"of {rank.number}", rank),
        "sum": distributed.sum_over_ranks(torch.tensor(rank.number + 1.0), rank).item(),
        "share": list(distributed.share_batches(3, rank)),
        "errors": errors,
    }


def test_collectives_make_their_own_group_under_torchrun(tmp_path):
    first, second = run(tmp_path, collectives, 2)
    assert (first.pop("share"), second.pop("share")) == ([[0, True], [2, True]], [[1, True], [2, False]])
    failures = first.pop("errors"), second.pop("errors")
    assert failures[0] == ["process 1: no such file", "no such file"]
    assert failures[1] == ["process 1: no such file", "the first process could not write: no such file"]
    assert first == second == {"gather": [0, 1], "broadcast": "of 0", "sum": 3.0}
    (alone,) = run(tmp_path, collectives, 1)
    assert alone == {
        "gather": [0],
        "broadcast": "of 0",
        "sum": 1.0,
        "share": [[0, True], [1, True], [2, True]],
        "errors": ["no such file", "no such file"],
    }
