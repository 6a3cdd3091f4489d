"""What opening a checkpoint gives, whatever its format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.files import file_hash


@dataclass
class Checkpoint:
    """A checkpoint as configuration and tensors in our names; tensors are memory-mapped and read when used."""

    config: dict[str, Any]
    state: Mapping[str, Tensor]
    family: str  # in words
    files: list[Path] = field(default_factory=list)
    tokenizer: str | None = None  # as JSON in our files; of a diffusers folder, the path of its `tokenizer`
    notes: list[str] = field(default_factory=list)  # for the user, one sentence each

    @cached_property
    def hash(self) -> str:
        """The file's sha256, or for several files the sha256 of theirs in order."""
        digests = [file_hash(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
