"""What happens between steps: validation, then logs, then checkpoints, in this order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from ldm.distributed import first_process
from ldm.errors import InputError
from ldm.training import checkpointing, lightning_private
from ldm.training.checkpointing import Found
from ldm.training.cost import Utilisation
from ldm.training.logs import Logs, row_is_due
from ldm.training.loop import Loop

SIGNALS = {signal.SIGTERM: "sigterm", signal.SIGINT: "sigint"}
CODES = {"sigterm": 143, "sigint": 130}


class RunCallback(Callback):
    """A run folder's side of training: where the run starts, what it writes, when it ends and with which status."""

    def __init__(
        self, folder: Path, main: bool, signals: dict[str, float], found: Found | None, store_config: Callable[[], None]
    ):
        self.folder, self.signals, self.code, self.found = folder, signals, 0, found
        self.store_config = store_config
        self.logs = Logs(folder) if main else None

    def on_fit_start(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        """Restore the newest valid checkpoint, if there is one, before the data are asked for."""
        assert isinstance(loop, Loop)
        if found := checkpointing.agreed(self.folder, self.found, loop.rank):
            checkpointing.restore(*found, loop)
        utilisation = Utilisation.of(loop)
        with self.explained():
            first_process(lambda: self.start(loop, utilisation), loop.rank)
        if loop.counters.step >= loop.settings.steps:
            trainer.should_stop = True

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Our own handlers of SIGTERM and SIGINT, for as long as this lasts."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install_handlers()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install_handlers(self) -> None:
        """The first signal stops the run at the end of a step; a second one does what it usually does."""

        def request(number: int, frame: Any) -> None:
            self.signals[SIGNALS[signal.Signals(number)]] = 1.0
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in SIGNALS:
            signal.signal(number, request)

    def on_train_start(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        """Lightning has replaced our handlers by its own; a signal that came meanwhile is in `signals`."""
        lightning_private.forget_signal(trainer)
        self.install_handlers()

    def on_train_batch_end(
        self, trainer: pl.Trainer, loop: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Do what the end of a step asks for; micro-batches within a step ask for nothing."""
        assert isinstance(loop, Loop)
        if loop.report:
            with self.explained():
                self.end_step(trainer, loop)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the disk says which checkpoint is left."""
        try:
            yield
        except (OSError, InputError) as error:
            if isinstance(error, OSError) or isinstance(error.__cause__, OSError):  # a log or a picture
                raise checkpointing.incomplete(error, self.folder) from error
            raise

    def end_step(self, trainer: pl.Trainer, loop: Loop) -> None:
        """Validate, log and save when it is due, and stop at the last step or for a signal."""
        settings, step, signals = loop.settings, loop.counters.step, loop.stop_requests
        ended, planned = step >= settings.steps, loop.advanced and not signals
        if planned and (ended or step % settings.validate_every == 0):
            with self.paused_clock():
                loop.report |= loop.validate(self.folder / "samples")
        if self.logs:
            self.logs.progress(loop)
        if row_is_due(loop, ended):
            first_process(lambda: self.logs.add_row(loop) if self.logs else None, loop.rank)
        if signals or ended or (planned and step % settings.save_every == 0):
            with self.paused_clock():
                checkpointing.write(self.folder, loop)
        if signals or ended:
            self.code = CODES[signals[0]] if signals and not ended else 0
            trainer.should_stop = True

    def start(self, loop: Loop, utilisation: Utilisation) -> None:
        """Write the first rank's files, after all ranks agree on where the run starts."""
        if self.logs:
            self.store_config()
            self.logs.start(loop, utilisation)

    def paused_clock(self) -> AbstractContextManager[None]:
        """What is not training does not count in images per second."""
        return self.logs.paused_clock() if self.logs else nullcontext()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.logs:
            self.logs.close()
