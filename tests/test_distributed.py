"""Collectives between two processes under torchrun: shared work comes back complete and in order on both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRUE = """
import json, os, sys, torch
from ldm.scenes import Scenes
from ldm.metrics.comparison import ReferenceSet, reference_features
from ldm.scenes.features import JudgeFeatures
os.environ["XDG_CACHE_HOME"] = sys.argv[1] + os.environ["RANK"] * (sys.argv[2] == "apart")
torch.set_num_threads(1)
features, data = JudgeFeatures(), Scenes(resolution=64, batch_size=2, size=100, workers=0)
sets = [ReferenceSet(data, {}, range(k, k + 5), 0) for k in (0, 5, 0)]
rows = [reference_features(features, each)["vectors"].tolist() for each in sets]
print(json.dumps(rows))
"""
WORK = """
import json, torch
from ldm.distributed import map_batches, torchrun_rank
mine = []
def work(k):
    mine.append(k)
    return {"x": torch.full((k,), k), "words": [f"{k}{i}" for i in range(k)]}
rows = map_batches([1, 2, 3, 4, 5], work, torchrun_rank(), "work")
print(json.dumps({"mine": mine, "x": rows["x"].tolist(), "words": rows["words"]}))
"""


def run(code: str, ranks: int, *words: str) -> list:
    """What each of so many processes prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    many = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, **many, "RANK": str(i)},
            stdout=subprocess.PIPE,
        )
        for i in range(ranks)
    ]
    found = [json.loads(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return found


def test_features_are_those_of_one_process_where_only_one_has_kept_some(tmp_path):
    """On nodes with folders of their own, the first one's decides."""
    alone = run(TRUE, 1, str(tmp_path / "cache"), "apart")[0]  # the first process's folder is filled now
    assert run(TRUE, 2, str(tmp_path / "cache"), "apart") == [alone, alone]
    assert run(TRUE, 2, str(tmp_path / "fresh"), "together") == [alone, alone]


def test_two_processes_find_what_one_finds():
    found = {ranks: run(WORK, ranks) for ranks in (1, 2)}
    assert [each.pop("mine") for each in found[2]] == [[1, 3, 5], [2, 4]]
    assert found[1][0].pop("mine") == [1, 2, 3, 4, 5]
    assert found[2][0] == found[2][1] == found[1][0]
    assert found[1][0]["words"][:3] == ["10", "20", "21"]


COLLECTIVES = """
import json, torch
from ldm.distributed import all_or_none, broadcast, first_process, gather, share_batches, sum_over_ranks, torchrun_rank
from ldm.errors import CheckpointError
rank = torchrun_rank()
def fails():
    raise CheckpointError("no such file")
errors = []
calls = (
    lambda: all_or_none(fails if rank.number == rank.of - 1 else lambda: 1, rank),
    lambda: first_process(fails, rank),
)
for call in calls:
    try:
        call()
    except CheckpointError as error:
        errors.append(str(error))
print(json.dumps({
    "gather": gather(rank.number, rank),
    "broadcast": broadcast(f"of {rank.number}", rank),
    "sum": sum_over_ranks(torch.tensor(rank.number + 1.0), rank).item(),
    "share": list(share_batches(3, rank)),
    "errors": errors,
}))
"""


def test_collectives_make_their_own_group_under_torchrun():
    first, second = run(COLLECTIVES, 2)
    assert (first.pop("share"), second.pop("share")) == ([[0, True], [2, True]], [[1, True], [2, False]])
    failures = first.pop("errors"), second.pop("errors")
    assert failures[0] == ["process 1: no such file", "no such file"]
    assert failures[1] == ["process 1: no such file", "the first process could not write: no such file"]
    assert first == second == {"gather": [0, 1], "broadcast": "of 0", "sum": 3.0}
    (alone,) = run(COLLECTIVES, 1)
    assert alone == {
        "gather": [0],
        "broadcast": "of 0",
        "sum": 1.0,
        "share": [[0, True], [1, True], [2, True]],
        "errors": ["no such file", "no such file"],
    }
