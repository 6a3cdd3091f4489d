"""Work that two processes share comes back whole and in order, on both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = """
import json, torch
from ldm.metrics.sharing import rank, shared
mine = []
def work(k):
    mine.append(k)
    return {"x": torch.full((k,), k), "words": [f"{k}{i}" for i in range(k)]}
rows = shared([1, 2, 3, 4, 5], work, "work")
print(json.dumps({"mine": mine, "x": rows["x"].tolist(), "words": rows["words"]}))
"""


def test_two_processes_find_what_one_finds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = {}
    for ranks in (1, 2):
        many = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORK], env={**os.environ, **many, "RANK": str(i)}, stdout=subprocess.PIPE
            )
            for i in range(ranks)
        ]
        found[ranks] = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
        assert all(process.returncode == 0 for process in processes)
    assert [each.pop("mine") for each in found[2]] == [[1, 3, 5], [2, 4]]
    assert found[1][0].pop("mine") == [1, 2, 3, 4, 5]
    assert found[2][0] == found[2][1] == found[1][0]
    assert found[1][0]["words"][:3] == ["10", "20", "21"]
