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
    """Warnings in one line each, but for captions that are cut off: they are counted, and it is said once."""
    from ldm.conditioning.tokenization import TruncatedText

    cut: set[str] = set()

    def show(message: Warning | str, *details: Any, **others: Any) -> None:
        """Now, or later with others."""
        if isinstance(message, TruncatedText):
            cut.add(message.text)
        else:
            show_warning(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TruncatedText)
        warnings.showwarning = show
        try:
            yield
        finally:
            if cut:
                show_warning(f"captions cut off at their ends, as the text encoder reads no more: {len(cut)}")
