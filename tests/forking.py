"""Forked processes, which have everything imported already, so that many can be started in little time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Work = Callable[[], int]  # returns the exit status


def ranks(works: Sequence[Work], logs: Sequence[Path]) -> list[int]:
    """The process ids of works that run together, as torchrun would have started them; each prints to its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(work, log, variables(rank, len(works), port)) for rank, (work, log) in enumerate(zip(works, logs))]


def variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process; nothing if it is alone."""
    if count == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    return {name: str(value) for name, value in {**numbers, **address}.items()}


def fork(work: Work, log: Path, environment: dict[str, str]) -> int:
    """The process id of a child that does this work."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: Sequence[int]) -> list[int]:
    """The exit statuses of processes, as a shell gives them."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [status if status >= 0 else 128 - status for status in statuses]
