"""What every conditioner is: it reads a batch, knows what "nothing" is, and drops its condition sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition, to_device


class Conditioner(nn.Module):
    """From a batch to a Condition; a frozen one stays in eval mode and without gradients, whoever holds it.

    `parts` are the names under which `drop` may take it away, with the rates at which training does so.
    """

    reads: tuple[str, ...] = ()  # keys of a batch
    context: int | None = None  # the tokens' width
    pooled: int | None = None  # the pooled vector's width
    classes: int | None = None  # the rows of the backbone's own label table
    concat_channels: int = 0
    frozen: bool = False
    parts: dict[str, float]

    def __init__(self, part: str, drop: float):
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop: out of range; got {drop}; expected 0 <= drop < 1; try 0.1")
        self.part, self.drop = part, drop
        self.parts = {part: drop}

    def read(self, batch: Mapping[str, Any]) -> Condition:
        """The condition of a batch, nothing dropped."""
        raise NotImplementedError

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        """What "nothing" is, for so many samples; `size` is the latents', and shapes what is concatenated."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Condition:
        """The condition of a batch, with nothing in its place where `drop[part]` (B,) is True.

        A cache has read it before if it is frozen: batch["states"][part] are its fields.
        """
        states = batch.get("states", {}).get(self.part) if self.frozen else None
        condition = self.online(batch) if states is None else Condition(**states).map(as_float)
        self.check_drop(drop or {}, batch_size(condition))
        return self.without(condition, drop or {})

    def online(self, batch: Mapping[str, Any]) -> Condition:
        """`read`, of a batch that has what it takes."""
        for key in self.reads:
            if key not in batch:
                got, expected = ", ".join(batch) or "nothing", ", ".join(self.reads)
                raise ValueError(f"batch: no {key!r} in it; got {got}; expected {expected}; try adding {key!r}")
        return self.read(batch)

    def without(self, condition: Condition, drop: Mapping[str, Tensor]) -> Condition:
        """A condition, fresh or from a cache, with nothing in its place where `drop` says so."""
        if self.part not in drop:
            return condition
        return choose(drop[self.part], self.null(batch_size(condition)), condition)

    def leaves(self) -> Iterator[tuple[str, Conditioner]]:
        """The conditioners that read something, each with the name of its part in the whole."""
        yield self.part, self

    def tokenizations(self):
        return {
            name: each
            for part, leaf in self.leaves()
            if leaf is not self
            for each in leaf.tokenizations().values()
            for name in [part]
        }

    def guided(self) -> list[str]:
        """The parts that guidance moves away from lacking: what is said, never what is laid beside the latents.

        What was never dropped is not among them, for the network does not know what lacking it is.
        """
        return [name for name, leaf in self.leaves() if leaf.drop and not leaf.concat_channels]

    def check_drop(self, drop: Mapping[str, Tensor], count: int) -> None:
        """Refuse to drop what is not here, or not sample by sample."""
        for part, flags in drop.items():
            if part not in self.parts:
                names = ", ".join(self.parts)
                raise ValueError(f"drop: no such part; got {part}; expected {names}; try {next(iter(self.parts))}")
            if flags.shape != (count,) or flags.dtype != torch.bool:
                got = f"{str(flags.dtype).removeprefix('torch.')} of shape {tuple(flags.shape)}"
                raise ValueError(f"drop.{part}: not a flag per sample; got {got}; expected bool of shape ({count},)")

    def train(self, mode: bool = True) -> Conditioner:
        """Training mode for what trains; what is frozen stays as it is."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """Fix all weights, for good."""
        self.frozen = True
        self.requires_grad_(False).eval()


def unguided(conditioner: Conditioner | None, cfg: float) -> str:
    """What to say where guidance is asked for and has nothing to move away from; else nothing."""
    if conditioner is None or cfg == 1 or conditioner.guided():
        return ""
    parts = ", ".join(conditioner.parts)
    return f"cfg {cfg:g} does nothing: {parts} was never dropped in training, or lies beside the latents"


def as_float(value: Tensor) -> Tensor:
    """Float32, whatever type it was stored in; masks as they are."""
    return value.float() if value.is_floating_point() else value


def batch_size(condition: Condition) -> int:
    """The number of samples that a condition is about."""
    values = (getattr(condition, field.name) for field in fields(condition))
    return next(len(value) for value in values if value is not None)


def choose(flags: Tensor, yes: Condition, no: Condition) -> Condition:
    """Sample by sample one condition or the other; both have the same fields."""
    chosen = {}
    for field in fields(Condition):
        a, b = getattr(yes, field.name), getattr(no, field.name)
        if b is not None:
            where = to_device(flags, b.device).reshape(-1, *[1] * (b.ndim - 1))
            chosen[field.name] = torch.where(where, to_device(a, b.device).to(b.dtype), b)
    return Condition(**chosen)


def repeat(condition: Condition, count: int) -> Condition:
    """One sample's condition for so many."""
    return condition.map(lambda value: value.expand(count, *value.shape[1:]))
