"""Tests use one thread and no network, and repeat exactly; the suite is shared out among processes.

Tests that share an expensive fixture are one group, which one process runs, so that the fixture is made once.
Long tests come first, so that no process is left with one at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None
)  # what fails will fail again, however slow the machine
hypothesis.settings.load_profile("same")

MOST_WORKERS = 16
EXPENSIVE = {  # fixtures that take seconds to make
    "finished_first_stage": "runs",
    "finished_second_stage": "runs",
    "sd1_folder": "diffusers",
    "large": "large",  # tests/checkpoint/test_memory.py
    "file": "features",  # tests/models/test_lpips.py, tests/metrics/test_inception.py
}


def pytest_addoption(parser, pluginmanager):
    """Without xdist (-p no:xdist), its options in pyproject.toml mean nothing."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="unused without xdist")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process for each core, but none beside this one for single files, whose tests are soon run."""
    if config.args and all(Path(argument.split("::")[0]).is_file() for argument in config.args):
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Group tests by their expensive fixtures, and begin with the long ones."""
    for item in items:
        groups = [EXPENSIVE[name] for name in item.fixturenames if name in EXPENSIVE]
        if groups and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(groups[0]))
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Before the first session fixture computes something."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    """A small Stable Diffusion 1 as diffusers saves it; nobody writes there."""
    from tests import small_models  # diffusers is slow to import

    folder = tmp_path_factory.mktemp("sd1")
    small_models.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_first_stage(tmp_path_factory):
    """The folder of a first stage of ten steps, `toy.KL`'s; nobody writes there."""
    from tests.training import killing, toy

    toy.plug()
    return trained(killing.command(tmp_path_factory.mktemp("first_stage") / "run"))


@pytest.fixture(scope="session")
def finished_second_stage(tmp_path_factory):
    """The folder of a second stage of ten steps, `second_stage.TWO`'s; beside it lies the first stage's file."""
    from tests.training import second_stage

    return trained(second_stage.command(tmp_path_factory.mktemp("second_stage") / "run"))


def trained(argv: list[str]) -> Path:
    """The folder of a run, which is done when this returns."""
    from ldm.cli import main

    assert main(argv[:-1]) == 0
    return Path(argv[4])


@pytest.fixture(scope="session")
def shipped():
    """The shipped model's pipeline; nobody changes it."""
    import ldm

    return ldm.load(device="cpu")
