"""What happens between steps: validation, then logs, then checkpoints, in this order."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from ldm.training import checkpointing
from ldm.training.logs import Logs
from ldm.training.stage import Stage
from ldm.training.utilisation import Utilisation

SIGNALS = {signal.SIGTERM: "sigterm", signal.SIGINT: "sigint"}
CODES = {"sigterm": 143, "sigint": 130}


class Run(Callback):
    """A run directory's side of training: where it begins, what it writes, when it ends and with which exit status."""

    def __init__(self, folder: Path, main: bool):
        self.folder, self.code = folder, 0
        self.logs = Logs(folder) if main else None
        self.saved_at = 0  # images seen at the last checkpoint
        self.handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Put everything back to the newest whole checkpoint, if there is one, before the data are asked for."""
        assert isinstance(stage, Stage)
        found = checkpointing.newest(self.folder)
        if found:
            checkpointing.restore(*found, stage)
        self.saved_at = stage.images_seen
        utilisation = Utilisation.of(stage)
        if self.logs:
            self.logs.begin(stage, stage.images_seen, utilisation)
        if stage.step >= stage.plan.steps:
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """A signal asks for a stop at the end of the step, a second one does as it always did."""
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}

        assert isinstance(stage, Stage)
        stop = stage.stop

        def request(number: int, frame: Any) -> None:
            stop[SIGNALS[signal.Signals(number)]] = 1.0
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in SIGNALS:
            signal.signal(number, request)

    def on_train_batch_end(
        self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Everything that the end of a step asks for."""
        assert isinstance(stage, Stage)
        if not stage.report:  # within an accumulated batch
            return
        asked = [name for name, value in stage.stop.items() if value > 0]
        ended = stage.step >= stage.plan.steps
        due = stage.advanced and not asked
        if due and (ended or stage.step % stage.plan.validate_every == 0):
            stage.report |= stage.validate(self.folder / "samples")
        if self.logs:
            self.logs.step(stage, ended)
        if asked or ended or (due and stage.step % stage.plan.save_every == 0):
            self.save(stage)
        if asked or ended:
            self.code = CODES[asked[0]] if asked and not ended else 0
            trainer.should_stop = True

    def save(self, stage: Stage) -> None:
        """A checkpoint, after the log of its step."""
        checkpointing.write(self.folder, stage, stage.images_seen - self.saved_at)
        self.saved_at = stage.images_seen
        if self.logs:
            self.logs.restart_clock(stage.images_seen)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give signals back, and close the logs."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.logs:
            self.logs.close()
