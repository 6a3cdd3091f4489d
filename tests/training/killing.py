"""Runs in forked processes, which have everything imported already, so that many can be killed in little time."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ldm.training.recipes.diffusion  # what a forked process need not import again
import ldm.training.run  # noqa: F401
from ldm.cli import main
from tests import waiting
from tests.training import toy

Begin = Callable[..., list[str]]
MOMENTS = 0.05  # seconds, by which a moment may be late
MARGIN = 5  # steps before the end, in which nothing is killed that may have ended by then


def command(run: Path, *overrides: str, config: str = toy.KL, name: str = "train-autoencoder") -> list[str]:
    """The command that begins a run, and goes on with it."""
    file = run.parent / "config.yaml"
    file.write_text(config, encoding="utf-8")
    return [name, "--config", str(file), "--run", str(run), *overrides, "--debug"]


def start(argv: list[str], ranks: int = 1) -> list[int]:
    """The processes of a command."""
    return started([argv] * ranks)


def started(argvs: list[list[str]]) -> list[int]:
    """Processes that work together, each with its own command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [forked(argv, rank, len(argvs), port) for rank, argv in enumerate(argvs)]


def alone(argv: list[str]) -> int:
    """The exit status of a command that is not forked: a fork cannot use the server of workers that was begun here."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-m", "ldm", *argv], env={**os.environ, **threads}, check=False).returncode


def forked(argv: list[str], rank: int, ranks: int, port: int) -> int:
    """One of them, as torchrun would have started it."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        if ranks > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "x"}
            os.environ.update({name: str(value) for name, value in {**numbers, **address}.items()})
        log = os.open(f"{argv[4]}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """The exit statuses of processes, as a shell gives them."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [status if status >= 0 else 128 - status for status in statuses]


def running(pid: int) -> bool:
    """Whether a process has not ended yet; it is not reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


CLOCKED = ("images_per_second", "tflops_per_second", "mfu")  # what a clock has a part in


def rows(run: Path) -> list[dict[str, str]]:
    """The log of a run, without what a clock had a part in."""
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return [{name: x for name, x in row.items() if name not in CLOCKED} for row in csv.DictReader(file)]


def last_step(run: Path) -> int:
    """The last step in a log that may be half-written just now."""
    try:
        return max((int(row["step"]) for row in rows(run)), default=0)
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def await_step(run: Path, step: int, pid: int) -> None:
    """Return when a step has been logged, or the process has ended."""
    waiting.until(lambda: last_step(run) >= step or not running(pid), Path(f"{run}.log").read_text)


def manifest(run: Path) -> dict:
    """The newest checkpoint's, with digests of weights, averages and optimiser state."""
    return json.loads(sorted(run.glob("checkpoints/*/manifest.json"))[-1].read_text())


def killed(argv: list[str], kills: int, steps: int, seed: int, ranks: int = 1) -> list[int]:
    """Run a command to its end although it is killed so many times; returns the steps at which it was."""
    run, moments, found = Path(argv[4]), random.Random(seed), []
    for k in range(kills):
        pids = start(argv, ranks)
        # somewhere in the k-th part of the run, so that all parts are hit
        await_step(run, moments.randint(k * steps // kills, (k + 1) * steps // kills - 1 - MARGIN), pids[0])
        time.sleep(moments.random() * MOMENTS)
        assert all(map(running, pids)), Path(f"{run}.log").read_text()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert wait(pids) == [128 + signal.SIGKILL] * ranks
        found.append(last_step(run))
    assert wait(start(argv, ranks)) == [0] * ranks, Path(f"{run}.log").read_text()
    return found


def assert_same_after_kills(
    folder: Path, kills: int, overrides: list[str], ranks: int = 1, steps: int = 60, begin: Begin = command
) -> None:
    """Losses, weights, averages and optimisers, bit for bit."""
    more = [*overrides, f"trainer.steps={steps}", f"trainer.devices={ranks}"]
    straight, broken = begin(folder / "straight", *more), begin(folder / "broken", *more)
    assert wait(start(straight, ranks)) == [0] * ranks, (folder / "straight.log").read_text()
    places = killed(broken, kills, steps, seed=kills, ranks=ranks)
    assert len(set(places)) == kills, places
    assert rows(folder / "broken") == rows(folder / "straight")
    assert manifest(folder / "broken") == manifest(folder / "straight")
    assert len({row["loss/loss"] for row in rows(folder / "straight")}) == steps


@pytest.fixture(autouse=True)
def toy_data():
    toy.plug()
