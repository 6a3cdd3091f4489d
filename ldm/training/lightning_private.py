"""The only places where private names of Lightning are used; a test names each of them when Lightning changes."""

from __future__ import annotations

import lightning.pytorch as pl


def skip_signal_broadcast(trainer: pl.Trainer) -> None:
    """Lightning asks the device after every batch if a signal came; our own check is part of the one read per step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def forget_signal(trainer: pl.Trainer) -> None:
    """Lightning would end a run at once for a SIGTERM that came before our handlers replaced its own."""
    trainer._signal_connector.received_sigterm = False
