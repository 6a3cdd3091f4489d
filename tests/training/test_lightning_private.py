"""The private names of Lightning that are used still exist and mean what they did; each failure names one."""

from __future__ import annotations

import ast
import inspect
import re
from operator import attrgetter
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from ldm.training import lightning_private
from ldm.training.trainer import TrainerSettings

ROOT = Path(lightning_private.__file__).parent.parent
NAMES = ("fit_loop.epoch_loop._broadcast_sigterm_tensor", "_signal_connector.received_sigterm")
BY_HAND = re.compile(r"trainer(?:\.\w+)*\._(?!_)\w+")


@pytest.fixture
def trainer() -> pl.Trainer:
    return TrainerSettings(steps=1, accelerator="cpu", devices=1).trainer([], False)


@pytest.mark.parametrize("name", NAMES)
def test_lightning_has_the_name(name):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    attrgetter(name)(pl.Trainer(accelerator="cpu", devices=1, **quiet))


def test_the_file_uses_these_names_alone():
    tree = ast.parse(inspect.getsource(lightning_private))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used == {part for name in NAMES for part in name.split(".")} | {"pytorch", "Trainer"} - {"pytorch"}


def test_nothing_else_uses_private_names_of_the_trainer():
    files = [file for file in ROOT.rglob("*.py") if BY_HAND.search(file.read_text(encoding="utf-8"))]
    assert [file.name for file in files] == ["lightning_private.py"]


def test_lightning_calls_what_is_replaced(trainer):
    """After every batch; the replacement asks no device."""
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)


def test_a_signal_is_forgotten(trainer):
    """Lightning ends a run for this flag, which its own handler sets."""
    trainer._signal_connector.received_sigterm = True
    assert trainer.received_sigterm
    lightning_private.forget_signal(trainer)
    assert not trainer.received_sigterm
