"""Runs in forked processes, which have everything imported already, so that many can be killed in little time."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import ldm.training.recipes.diffusion  # what a forked process need not import again
import ldm.training.run  # noqa: F401
from ldm.cli import main
from tests import forking, waiting
from tests.forking import wait
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
    return forking.ranks([partial(main, argv) for argv in argvs], [Path(f"{argv[4]}.log") for argv in argvs])


def alone(argv: list[str]) -> int:
    """The exit status of a command that is not forked: a fork cannot use the server of workers that was begun here."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-m", "ldm", *argv], env={**os.environ, **threads}, check=False).returncode


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
