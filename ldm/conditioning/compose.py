"""Several conditioners as one: their tokens one after the other, or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ldm.condition import Condition, to_device
from ldm.conditioning.conditioner import Conditioner


class Compose(Conditioner):
    """Joins tokens along their length or their width (SDXL), pooled vectors along their width, images as channels.

    Each part keeps its own null, so a sample may lack one part and have another.
    """

    def __init__(
        self,
        *,
        parts: list[Conditioner],  # conditioners
        by: Literal["tokens", "channels"] = "tokens",  # join tokens along their length, or their width as in SDXL
    ):
        if not parts:
            raise ValueError("parts: empty; got []; expected conditioners; try one or more")
        super().__init__("", 0.0)
        self.members, self.by = nn.ModuleList(parts), by
        self.names: list[dict[str, str]] = []  # for each member, its own names of parts -> the names in the whole
        self.parts = {}
        for member in parts:
            self.names.append({})
            for name, rate in member.parts.items():
                self.names[-1][name] = self.free_name(name)
                self.parts[self.names[-1][name]] = rate
        self.drop = max(self.parts.values())
        self.reads = tuple(dict.fromkeys(key for member in parts for key in member.reads))
        self.frozen = all(member.frozen for member in parts)
        self.measure(parts)

    def named_members(self) -> Iterator[tuple[Conditioner, dict[str, str]]]:
        """Each member with its names of parts."""
        return zip(cast("list[Conditioner]", self.members), self.names)

    def leaves(self) -> Iterator[tuple[str, Conditioner]]:
        for member, names in self.named_members():
            yield from ((names[name], leaf) for name, leaf in member.leaves())

    def free_name(self, name: str) -> str:
        """The name of a part, with a number from the second of its kind on."""
        names = [name, *(f"{name}_{number}" for number in range(2, len(self.parts) + 2))]
        return next(candidate for candidate in names if candidate not in self.parts)

    def measure(self, parts: Sequence[Conditioner]) -> None:
        """Set what the backbone is built for."""
        widths = [member.context for member in parts if member.context is not None]
        if self.by == "tokens" and len(set(widths)) > 1:
            raise ValueError(f"parts: tokens differ in width; got {widths}; expected one width; try by: channels")
        self.context = (sum(widths) if self.by == "channels" else widths[0]) if widths else None
        pooled = [member.pooled for member in parts if member.pooled is not None]
        labels = [member.classes for member in parts if member.classes is not None]
        if len(labels) + bool(pooled) > 1:
            got = f"{len(labels)} with labels, {len(pooled)} with pooled vectors"
            raise ValueError(f"parts: labels and pooled vectors cannot be combined; got {got}; try a width for labels")
        self.pooled, self.classes = sum(pooled) or None, labels[0] if labels else None
        self.concat_channels = sum(member.concat_channels for member in parts)
        vectors = [(name, vector) for member in parts for name, vector in member.vectors.items()]
        self.vectors = dict(vectors)
        tables = [name for name, vector in vectors if vector.kind == "index"] + ["label"] * len(labels)
        if len(self.vectors) < len(vectors) or len(tables) > 1:
            got = ", ".join(tables if len(tables) > 1 else (name for name, _ in vectors))
            raise ValueError(f"parts: vectors need different names, and one label table at most; got {got}")
        factors = (member.low_resolution_factor for member in parts)
        self.low_resolution_factor = next((factor for factor in factors if factor is not None), None)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return self.join([member.null(count, size) for member, _ in self.named_members()])

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Condition:
        """Each part's condition, or its null where `drop[part]` (B,) is True."""
        drop = drop or {}
        conditions = []
        for member, names in self.named_members():
            own = {
                key: {name: batch[key][inner] for name, inner in names.items() if inner in batch[key]}
                for key in ("states", "ids")
                if key in batch
            }
            conditions.append(member({**batch, **own}, {k: drop[name] for k, name in names.items() if name in drop}))
        self.check_drop(drop, conditions[0].batch_size)
        return self.join(conditions)

    def without(self, condition: Condition, drop: Mapping[str, Tensor]) -> Condition:
        """Not supported: a joined condition cannot be split into its parts."""
        raise NotImplementedError("parts have to be dropped before they are joined")

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Join the parts' conditions."""
        masks = [mask_of(c.tokens, c.mask) for c in conditions if c.tokens is not None]
        tokens = [c.tokens for c in conditions if c.tokens is not None]
        if self.by == "channels" and len({states.shape[1] for states in tokens}) > 1:
            got = " and ".join(str(states.shape[1]) for states in tokens)
            raise ValueError(f"parts: numbers of tokens differ; got {got}; expected one number; try by: tokens")
        mask = None
        if any(c.mask is not None for c in conditions):
            mask = torch.stack(masks).all(0) if self.by == "channels" else torch.cat(masks, 1)
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        images = [c.concat for c in conditions if c.concat is not None]
        device = max((x.device for x in images), key=lambda device: device.type != "cpu", default=None)
        return Condition(
            tokens=torch.cat(tokens, 1 if self.by == "tokens" else 2) if tokens else None,
            mask=mask,
            pooled=(torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]) if pooled else None,
            concat=torch.cat([to_device(x, device) for x in images], 1) if device else None,
            vectors={name: x for c in conditions for name, x in (c.vectors or {}).items()} or None,
        )


def mask_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, or one that counts all tokens."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
