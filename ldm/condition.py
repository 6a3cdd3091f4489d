"""What a conditioner hands to a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """On a device; a GPU takes it without being waited for."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@dataclass(frozen=True)
class Condition:
    """Everything a denoiser may be told beside x and the noise level; each field is None or has the batch first."""

    tokens: Tensor | None = None  # (B, L, D)   attended to by cross-attention
    mask: Tensor | None = None  # (B, L)      True where a token counts
    pooled: Tensor | None = None  # (B, P)      joins the timestep embedding
    concat: Tensor | None = None  # (B, C, ...) joins x as channels

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function (a move, a cast, an index) to each field that is there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Condition(**{name: None if value is None else function(value) for name, value in values.items()})

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """Join conditions along the batch; they must have the same fields."""
        columns = {field.name: [getattr(c, field.name) for c in conditions] for field in fields(Condition)}
        for name, column in columns.items():
            if len({value is None for value in column}) > 1:
                raise ValueError(f"condition.{name}: given for some of the batch and not for the rest")
            if len({value.shape[1:] for value in column if value is not None}) > 1:
                shapes = " and ".join(str(tuple(value.shape)) for value in column)
                raise ValueError(f"condition.{name}: not alike; got {shapes}; expected the same but for the batch")
        return Condition(**{name: None if column[0] is None else torch.cat(column) for name, column in columns.items()})
