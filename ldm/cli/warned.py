"""Warnings in one line, as errors are, and many of one kind in one together."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def show_warning(message: Warning | str, *details: Any, **others: Any) -> None:
    """In one line."""
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def counting_cuts() -> Iterator[None]:
    """Warnings in one line each, but for texts that are cut off: they are counted, and it is said once."""
    from ldm.conditioning.text import CutOff

    cut: list[Warning | str] = []  # a line for each would be many
    warnings.showwarning = lambda text, kind, *_: cut.append(text) if kind is CutOff else show_warning(text)
    yield
    if cut:
        show_warning(f"the end of a text is cut off in {len(cut)} captions, as the text encoder reads no more")
