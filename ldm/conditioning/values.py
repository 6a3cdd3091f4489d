"""Numbers that a user gives as a condition, by the names that a conditioner reads."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError, shown


def read_values(given: Mapping[str, Any] | str | Path, names: Collection[str]) -> dict[str, Tensor]:
    """One picture's numbers as a batch, from a dictionary or a JSON file of the form {name: numbers, ...}."""
    file, expected = "" if isinstance(given, Mapping) else str(given), f"a mapping of {', '.join(names) or 'nothing'}"
    node = given if isinstance(given, Mapping) else parsed(Path(given), expected)
    if not isinstance(node, Mapping) or not node or not set(node) <= set(names):
        got = f"the keys {', '.join(map(str, node)) or 'none'}" if isinstance(node, Mapping) else shown(node)
        raise InputError("condition: not what this model reads", file, got, expected)
    try:
        return {name: torch.as_tensor(value)[None] for name, value in node.items()}  # (1, ...)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("condition: not numbers", file, str(error), expected) from None


def parsed(file: Path, expected: str) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("condition: cannot be read", str(file), error.strerror or "", expected) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError("condition: not JSON", str(file), str(error), expected) from None
