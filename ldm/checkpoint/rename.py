"""Key maps: the tensors of a state dict under other names, and in other shapes, without losing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError

State = dict[str, Tensor]
Pairs = list[tuple[str, str]]  # (ours, theirs)


class Joint(NamedTuple):
    """One matrix of theirs that holds several of ours, such as q, k and v, interleaved head by head."""

    name: str
    parts: Sequence[str]
    heads: int = 1


@dataclass
class KeyMap:
    """How another program stores a network: its names, and the tensors that have another shape there."""

    pairs: Pairs
    joints: list[Joint] = field(default_factory=list)
    transposed: tuple[str, ...] = ()  # their names
    convolutions: dict[str, int] = field(default_factory=dict)  # 1x1 convolutions, linear here: their dimensions

    def read(self, theirs: Mapping[str, Tensor], network: nn.Module) -> State:
        """Our tensors from theirs; every tensor must have its place."""
        state = self.transpose(self.split(theirs))
        ours, own = rename(state, swap(self.pairs)), network.state_dict()
        return {name: x.flatten(1) if own[name].ndim == 2 and x.ndim > 2 else x for name, x in ours.items()}

    def write(self, ours: Mapping[str, Tensor]) -> State:
        """Their tensors from ours."""
        theirs = self.transpose(rename(ours, self.pairs))
        for name, parts, heads in self.joints:
            tensors = [theirs.pop(part) for part in parts]
            split = [x.reshape(heads, -1, *x.shape[1:]) for x in tensors]  # (H, D, ...)
            theirs[name] = torch.stack(split, 1).flatten(0, 2)  # (3C, ...)
        for name, dimensions in self.convolutions.items():
            theirs[name] = theirs[name].reshape(*theirs[name].shape, *[1] * (dimensions - 2))
        return theirs

    def split(self, theirs: Mapping[str, Tensor]) -> State:
        """Their tensors with each joint matrix split into its parts."""
        state = dict(theirs)
        refuse("missing tensors", [joint.name for joint in self.joints if joint.name not in state])
        for name, parts, heads in self.joints:
            x, rows = state.pop(name), heads * len(parts)
            if x.ndim == 0 or len(x) % rows:
                got, expected = f"{name} {tuple(x.shape)}", f"a multiple of {rows} rows"
                raise CheckpointError("tensors of another shape", got=got, expected=expected)
            x = x.reshape(heads, len(parts), -1, *x.shape[1:])  # (H, 3, D, ...)
            state |= {part: x[:, number].flatten(0, 1) for number, part in enumerate(parts)}
        return state

    def transpose(self, state: State) -> State:
        """The tensors with those transposed that are so in the other program."""
        return state | {name: state[name].T.contiguous() for name in self.transposed if name in state}


def rename(state: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> State:
    """The tensors under new names, by pairs (old, new); a missing or left-over tensor is an error.

    An old name in two pairs is written twice; two old names that become one must hold equal numbers.
    """
    old_names = {old for old, _ in pairs}
    refuse("missing tensors", [old for old in dict.fromkeys(old for old, _ in pairs) if old not in state])
    refuse("unexpected tensors", [name for name in state if name not in old_names])
    renamed: State = {}
    for old, new in pairs:
        if new in renamed and not torch.equal(renamed[new], state[old]):
            raise CheckpointError(f"copies of {new} differ", got=f"other numbers in {old}", expected="equal copies")
        renamed[new] = state[old]
    return renamed


def swap(pairs: Sequence[tuple[str, str]]) -> Pairs:
    """The pairs in the other direction."""
    return [(new, old) for old, new in pairs]


def expand(network: nn.Module, modules: Pairs) -> Pairs:
    """Pairs of parameters from pairs of modules, for the parameters that the network has."""
    parameters = dict(network.named_parameters())
    pairs = [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in modules for leaf in ("weight", "bias")]
    return [(ours, theirs) for ours, theirs in pairs if ours in parameters]


def columns(table: str) -> dict[str, dict[str, str]]:
    """Names in several layouts, from a table with a column for each; the first column is the key, `-` is no name."""
    layouts, *rows = (line.split() for line in table.strip().splitlines())
    return {layout: {row[0]: row[i] for row in rows if row[i] != "-"} for i, layout in enumerate(layouts)}


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def above(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors with a prefix before their names."""
    return {f"{prefix}{name}": x for name, x in state.items()}


def refuse(what: str, names: Sequence[str]) -> None:
    """Raise if there are names; the error has their count and the first five."""
    if names:
        shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        raise CheckpointError(what, got=f"{len(names)}: {shown}", expected="none", hint="another layout")
