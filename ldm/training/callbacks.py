"""What happens between steps: validation, then logs, then checkpoints, in this order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from ldm.distributed import first_process
from ldm.errors import InputError
from ldm.training import checkpointing
from ldm.training.checkpointing import Found
from ldm.training.logs import Logs, due
from ldm.training.loop import Stage
from ldm.training.utilisation import Utilisation

SIGNALS = {signal.SIGTERM: "sigterm", signal.SIGINT: "sigint"}
CODES = {"sigterm": 143, "sigint": 130}


class Run(Callback):
    """A run directory's side of training: where it begins, what it writes, when it ends and with which exit status."""

    def __init__(
        self, folder: Path, main: bool, stop: dict[str, float], begun: Found | None, remember: Callable[[], None]
    ):
        self.folder, self.stop, self.code, self.begun, self.remember = folder, stop, 0, begun, remember
        self.logs = Logs(folder) if main else None

    def on_fit_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Put everything back to the newest whole checkpoint, if there is one, before the data are asked for."""
        assert isinstance(stage, Stage)
        found = checkpointing.agreed(self.folder, self.begun, stage.rank)
        if found:
            checkpointing.restore(*found, stage)
        utilisation = Utilisation.of(stage)
        with self.explained():
            first_process(partial(self.begin, stage, utilisation), stage.rank)
        if stage.step >= stage.plan.steps:
            trainer.should_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are ours, from now on until this ends."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """A signal asks for a stop at the end of a step, a second one does as it always did."""

        def request(number: int, frame: Any) -> None:
            self.stop[SIGNALS[signal.Signals(number)]] = 1.0
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in SIGNALS:
            signal.signal(number, request)

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Lightning has put its own handlers before ours; what came meanwhile is in `stop`."""
        trainer._signal_connector.received_sigterm = False
        self.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Everything that the end of a step asks for."""
        assert isinstance(stage, Stage)
        if not stage.report:  # within an accumulated batch
            return
        with self.explained():
            self.end_step(trainer, stage)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What cannot be written, with what there is of checkpoints."""
        try:
            yield
        except (OSError, InputError) as error:
            if isinstance(error, OSError) or isinstance(error.__cause__, OSError):  # a log or a picture
                raise checkpointing.incomplete(error, self.folder) from error
            raise

    def end_step(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Measure, log and save where it is due, and stop where the plan or a signal says so."""
        asked, ended = stage.asked, stage.step >= stage.plan.steps
        planned = stage.advanced and not asked
        if planned and (ended or stage.step % stage.plan.validate_every == 0):
            with self.aside():
                stage.report |= stage.validate(self.folder / "samples")
        if self.logs:
            self.logs.progress(stage)
        if due(stage, ended):
            first_process(partial(self.add_row, stage), stage.rank)
        if asked or ended or (planned and stage.step % stage.plan.save_every == 0):
            with self.aside():
                checkpointing.write(self.folder, stage)
        if asked or ended:
            self.code = CODES[asked[0]] if asked and not ended else 0
            trainer.should_stop = True

    def begin(self, stage: Stage, utilisation: Utilisation) -> None:
        """The first process's files, now that all agree on where the run stands."""
        if self.logs:
            self.remember()
            self.logs.begin(stage, stage.images_seen, utilisation)

    def add_row(self, stage: Stage) -> None:
        """What the step that ended says, in the logs."""
        if self.logs:
            self.logs.step(stage)

    def aside(self) -> AbstractContextManager[None]:
        """What is not training, for the clock of those who have one."""
        return self.logs.stopped_clock() if self.logs else nullcontext()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the logs."""
        if self.logs:
            self.logs.close()
