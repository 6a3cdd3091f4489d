"""Waiting for what another process does; the end of patience is far off, so that no busy machine comes to it."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 240.0  # seconds, after which something hangs


def until(done: Callable[[], object], said: Callable[[], str] = str) -> None:
    """Return once `done()` is true; `said()` tells what there was instead of it."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, said()
        time.sleep(0.002)
