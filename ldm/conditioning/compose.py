"""Several conditions as one: their tokens one after the other, or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.condition import Condition, to_device
from ldm.conditioning.conditioner import Conditioner, batch_size


class Compose(Conditioner):
    """Conditioners joined: tokens along their length, or along their width (SDXL); vectors and images as channels.

    Each part keeps its own nothing, so a sample may lack one and have the other.
    """

    def __init__(
        self,
        *,
        parts: list[Conditioner],  # conditioners
        by: Literal["tokens", "channels"] = "tokens",  # along their length, or along their width as in SDXL
    ):
        if by not in ("tokens", "channels"):
            raise ValueError(f"by: unknown; got {by}; expected tokens or channels; try tokens")
        if not parts:
            raise ValueError("parts: nothing to join; got an empty list; expected conditioners; try one or more")
        super().__init__("", 0.0)
        self.members, self.by = nn.ModuleList(parts), by
        self.names: list[list[tuple[str, str]]] = []  # for each member, (its own name of a part, the name here)
        self.parts = {}
        for member in parts:
            self.names.append([])
            for name, rate in member.parts.items():
                here = self.free_name(name)
                self.names[-1].append((name, here))
                self.parts[here] = rate
        self.drop = max(self.parts.values())
        self.reads = tuple(dict.fromkeys(key for member in parts for key in member.reads))
        self.frozen = all(member.frozen for member in parts)
        self.measure(parts)

    def leaves(self) -> Iterator[tuple[str, Conditioner]]:
        for member, names in zip(self.members, self.names):
            here = dict(names)
            yield from ((here[name], leaf) for name, leaf in member.leaves())  # type: ignore[operator]

    def free_name(self, name: str) -> str:
        """The name of a part, numbered from the second of a kind on."""
        names = [name, *(f"{name}_{number}" for number in range(2, len(self.parts) + 2))]
        return next(candidate for candidate in names if candidate not in self.parts)

    def measure(self, parts: Sequence[Conditioner]) -> None:
        """What a backbone must know of the whole."""
        widths = [member.context for member in parts if member.context is not None]
        if self.by == "tokens" and len(set(widths)) > 1:
            raise ValueError(
                f"parts: tokens of several widths cannot follow one another; got {widths}; expected one width; "
                "try by: channels"
            )
        self.context = (sum(widths) if self.by == "channels" else widths[0]) if widths else None
        vectors = [member.pooled for member in parts if member.pooled is not None]
        labels = [member.classes for member in parts if member.classes is not None]
        if len(labels) + bool(vectors) > 1:
            got = f"{len(labels)} with labels, {len(vectors)} with vectors"
            raise ValueError(f"parts: one label or some vectors can be told; got {got}; expected one kind; try a width")
        self.pooled, self.classes = sum(vectors) or None, labels[0] if labels else None
        self.concat_channels = sum(member.concat_channels for member in parts)

    def read(self, batch: Mapping[str, Any]) -> Condition:
        return self.join([member(batch) for member in self.members])

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return self.join([member.null(count, size) for member in self.members])  # type: ignore[operator]

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Condition:
        """Each part's condition, or its nothing where `drop[part]` (B,) is True."""
        drop = drop or {}
        conditions = []
        for member, names in zip(self.members, self.names):
            states, flags, ids = (
                {name: x[here] for name, here in names if here in x}
                for x in (batch.get("states", {}), drop, batch.get("ids", {}))
            )
            conditions.append(member({**batch, "states": states, "ids": ids}, flags))
        self.check_drop(drop, batch_size(conditions[0]))
        return self.join(conditions)

    def without(self, condition: Condition, drop: Mapping[str, Tensor]) -> Condition:
        """Not to be had: what is joined no longer tells its parts apart."""
        raise NotImplementedError("each part's condition has to be dropped before they are joined")

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """One condition of several."""
        spoken = [condition for condition in conditions if condition.tokens is not None]
        tokens, masks = [c.tokens for c in spoken if c.tokens is not None], [mask_of(c) for c in spoken]
        masked = any(condition.mask is not None for condition in spoken)
        if self.by == "channels" and len({states.shape[1] for states in tokens}) > 1:
            got = " and ".join(str(states.shape[1]) for states in tokens)
            raise ValueError(
                f"parts: tokens side by side must be as many; got {got}; expected one length; try by: tokens"
            )
        joint_mask = torch.stack(masks).all(0) if self.by == "channels" and masked else None
        if self.by == "tokens" and masked:
            joint_mask = torch.cat(masks, 1)
        vectors = [condition.pooled for condition in conditions if condition.pooled is not None]
        images = [condition.concat for condition in conditions if condition.concat is not None]
        where = max((x.device for x in images), key=lambda device: device.type != "cpu", default=None)
        return Condition(
            tokens=torch.cat(tokens, 1 if self.by == "tokens" else 2) if tokens else None,
            mask=joint_mask,
            pooled=(torch.cat(vectors, 1) if len(vectors) > 1 else vectors[0]) if vectors else None,
            concat=torch.cat([to_device(x, where) for x in images], 1) if where else None,
        )


def mask_of(condition: Condition) -> Tensor:
    """Which tokens count; all, where no mask says otherwise."""
    if condition.mask is not None:
        return condition.mask
    assert condition.tokens is not None
    return torch.ones(condition.tokens.shape[:2], dtype=torch.bool, device=condition.tokens.device)
