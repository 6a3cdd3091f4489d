"""Warnings as single lines, like errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def show_warning(message: Warning | str, *details: Any, **others: Any) -> None:
    """Print a warning as one line."""
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def count_truncations() -> Iterator[None]:
    """Print each warning as one line, but only the number of truncated captions."""
    from ldm.conditioning.tokenization import TruncatedText

    truncated: set[str] = set()

    def show(message: Warning | str, *details: Any, **others: Any) -> None:
        if isinstance(message, TruncatedText):
            truncated.add(message.text)
        else:
            show_warning(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TruncatedText)
        warnings.showwarning = show
        try:
            yield
        finally:
            if truncated:
                show_warning(f"{len(truncated)} captions truncated to the text encoder's length")
