"""Renaming the tensors of a state dict by pairs, without losing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.errors import CheckpointError


def rename(state: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors of `state` under new names, by pairs (old, new): every key exactly, or an error that says which.

    An old name in two pairs is written twice; two old names that become one must hold the same numbers.
    """
    old_names = {old for old, _ in pairs}
    refuse("tensors are missing", [old for old in dict.fromkeys(old for old, _ in pairs) if old not in state])
    refuse("tensors without a place", [name for name in state if name not in old_names])
    renamed: dict[str, Tensor] = {}
    for old, new in pairs:
        if new in renamed and not torch.equal(renamed[new], state[old]):
            raise CheckpointError(f"copies of {new} differ", got=f"other numbers in {old}", expected="equal copies")
        renamed[new] = state[old]
    return renamed


def swap(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same pairs in the other direction."""
    return [(new, old) for old, new in pairs]


def refuse(what: str, names: Sequence[str]) -> None:
    """Raise if there are names, with their count and the first five."""
    if names:
        more = ", ..." if len(names) > 5 else ""
        raise CheckpointError(
            what, got=f"{len(names)}: {', '.join(names[:5])}{more}", expected="none", hint="another layout"
        )
