"""Verifiers: whether a picture shows what its caption says, for types of data in which that can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ldm.config import parts
from ldm.data.loader import Data


class Verifier(Protocol):
    """What the table `verifier` names for a type of data."""

    kinds: Sequence[str]  # of prompts
    yardsticks: Mapping[str, tuple[str, str]]  # name -> two kinds, whose pictures are a known distance apart

    def prompts(self, kind: str, count: int, like: Data, seed: int) -> Data:
        """`count` true pictures of a kind with captions, of the size and batch size of `like`."""
        ...

    def scores(self, x: Tensor, prompts: Sequence[str]) -> list[Any]:
        """A score for each picture, x (B, 3, H, W) in [-1, 1], and its prompt."""
        ...

    def tally(self, scores: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """(correct, total) by part of a prompt, and of all pictures under `whole`."""
        ...


def find_verifier(data_type: str) -> Verifier | None:
    """The verifier of this type of data, if it has one."""
    return parts.find("verifier", data_type)() if data_type in parts.TABLES["verifier"] else None
