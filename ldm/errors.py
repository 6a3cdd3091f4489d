"""Errors for people: one line that says what, where, got, expected, try."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any


class LdmError(Exception):
    """An error that its reader can act on; commands print it as one line and exit with its code."""

    code = 1
    table: Sequence[str] = ()  # lines that a command prints before the error's

    def __init__(self, what: str, where: str = "", got: str = "", expected: str = "", hint: str = ""):
        where = f" ({where})" if where else ""
        parts = [what + where]
        parts += [f"{label} {text}" for label, text in (("got", got), ("expected", expected), ("try", hint)) if text]
        super().__init__(" ".join("; ".join(parts).splitlines()))


class InputError(LdmError):
    """An error in a configuration, an option or a prompt."""

    code = 2


class DataError(LdmError):
    """An error in the data."""

    code = 3


class CheckpointError(LdmError):
    """An error in a checkpoint file."""

    code = 4


class DivergedError(LdmError):
    """Training or sampling produced numbers that are not finite."""

    code = 5


def shown(value: Any) -> str:
    """A value in JSON, truncated to 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: Any, names: Iterable[str], cutoff: float = 0.5) -> str:
    """The name that was probably meant, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff) if isinstance(name, str) else []
    return "".join(close)
