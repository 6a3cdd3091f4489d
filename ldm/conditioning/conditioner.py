"""The interface of every conditioner: it reads a batch, knows its null, and drops its condition sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition, Vector
from ldm.conditioning.tokenization import Tokenization


class Conditioner(nn.Module):
    """From a batch to a Condition; a frozen one always stays in eval mode and without gradients.

    `parts` holds the names by which `drop` can remove parts of the condition, with their rates in training.
    """

    reads: tuple[str, ...] = ()  # keys of a batch
    context: int | None = None  # width of the tokens
    pooled: int | None = None  # width of the pooled vector
    classes: int | None = None  # rows of the backbone's label table
    concat_channels: int = 0
    vectors: Mapping[str, Vector] = {}
    low_resolution_factor: int | None = None  # how many times smaller than the picture batch["low_resolution"] is
    frozen: bool = False
    parts: dict[str, float]

    def __init__(self, part: str, drop: float):
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop: out of range; got {drop}; expected 0 <= drop < 1; try 0.1")
        self.part, self.drop = part, drop
        self.parts = {part: drop}

    @property
    def tokenization(self) -> Tokenization | None:
        """How texts become token ids, if this reads texts."""
        return None

    def tokenizations(self) -> dict[str, Tokenization]:
        """The tokenizations by part; batch["ids"][part] may hold their ids."""
        found = {name: leaf.tokenization for name, leaf in self.leaves()}
        return {name: tokenization for name, tokenization in found.items() if tokenization is not None}

    def gives(self) -> list[str]:
        """The fields of its conditions."""
        widths = {"tokens": self.context, "pooled": self.pooled or self.classes, "vectors": self.vectors}
        return [name for name, width in widths.items() if width]

    def read(self, batch: Mapping[str, Any]) -> Condition:
        """The condition of a batch, with nothing dropped."""
        raise NotImplementedError

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        """The null condition for `count` samples; `size` is that of the latents, for concatenated channels."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Condition:
        """The condition of a batch, with the null where `drop[part]` (B,) is True.

        batch["states"][part] may hold the fields of a frozen conditioner's condition, from a cache.
        """
        states = batch.get("states", {}).get(self.part) if self.frozen else None
        condition = self.online(batch) if states is None else Condition(**states).map(as_float)
        self.check_drop(drop or {}, condition.batch_size)
        return self.without(condition, drop or {})

    def online(self, batch: Mapping[str, Any]) -> Condition:
        """`read`, after a check of the batch's keys."""
        for key in () if self.part in batch.get("ids", {}) else self.reads:
            if key not in batch:
                got, expected = ", ".join(batch) or "nothing", ", ".join(self.reads)
                raise ValueError(f"batch: has no {key!r}; got {got}; expected {expected}; try adding {key!r}")
        return self.read(batch)

    def without(self, condition: Condition, drop: Mapping[str, Tensor]) -> Condition:
        """A condition, fresh or from a cache, with the null where `drop` is True."""
        if self.part not in drop:
            return condition
        return Condition.choose(drop[self.part], self.null(condition.batch_size), condition)

    def leaves(self) -> Iterator[tuple[str, Conditioner]]:
        """The conditioners that read a batch, each with the name of its part."""
        yield self.part, self

    def guided(self) -> list[str]:
        """The parts that guidance replaces by their null; concatenated channels stay.

        Parts that were never dropped are not among them, because the network does not know their null.
        """
        return [name for name, leaf in self.leaves() if leaf.drop and not leaf.concat_channels]

    def check_drop(self, drop: Mapping[str, Tensor], count: int) -> None:
        """Refuse unknown parts, and flags that are not one per sample."""
        for part, flags in drop.items():
            if part not in self.parts:
                names = ", ".join(self.parts)
                raise ValueError(f"drop: no such part; got {part}; expected {names}; try {next(iter(self.parts))}")
            if flags.shape != (count,) or flags.dtype != torch.bool:
                got = f"{str(flags.dtype).removeprefix('torch.')} of shape {tuple(flags.shape)}"
                raise ValueError(f"drop.{part}: not a flag per sample; got {got}; expected bool of shape ({count},)")

    def train(self, mode: bool = True) -> Conditioner:
        """Set training mode; a frozen conditioner stays in eval mode."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """Freeze all weights for good."""
        self.frozen = True
        self.requires_grad_(False).eval()


def unguided(conditioner: Conditioner | None, cfg: float) -> str:
    """A warning where guidance has no null to move away from, or an empty string."""
    if conditioner is None or cfg == 1 or conditioner.guided():
        return ""
    parts = ", ".join(conditioner.parts)
    return f"cfg {cfg:g} has no effect: {parts} was never dropped in training, or is concatenated to the latents"


def as_float(value: Tensor) -> Tensor:
    """Float32 for any floating type; masks and integers unchanged."""
    return value.float() if value.is_floating_point() else value
