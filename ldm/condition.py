"""What a conditioner hands to a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move to a device; a copy from the CPU to a GPU does not block."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Vector(NamedTuple):
    """How a backbone embeds one of `Condition.vectors`: the conditioner declares it, the backbone builds for it."""

    kind: Literal["numbers", "vector", "index"]  # sinusoids of each number, a vector as it is, or rows of a table
    size: int  # how many numbers, the vector's width, or the table's rows


def at_least_float32(x: Tensor) -> Tensor:
    """Float32 or wider: samples, differences and means are never rounded to half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Condition:
    """Everything a denoiser may be given beside x and the noise level; each tensor has the batch first."""

    tokens: Tensor | None = None  # (B, L, D)   attended to by cross-attention
    mask: Tensor | None = None  # (B, L)      True where a token counts
    pooled: Tensor | None = None  # (B, P)      joins the time embedding; (B,) integers are class labels
    concat: Tensor | None = None  # (B, C, ...) joins x as channels
    vectors: Mapping[str, Tensor] | None = None  # (B,), (B, n) or (B, P) each, by name; they join the time embedding
    control: Sequence[Tensor] | None = None  # residuals: one per U-Net skip and one for the middle, or one per block

    def items(self) -> Iterator[tuple[str, Any]]:
        """The fields that are set."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, value) for name, value in values if value is not None)

    @property
    def batch_size(self) -> int:
        """The number of samples."""
        return len(next(_tensors(dict(self.items()))))

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function (a move, a cast, an index) to every tensor."""
        return _combine(lambda name, x: function(x), self)

    def repeat(self, count: int) -> Condition:
        """The condition of one sample for `count` samples."""
        return self.map(lambda x: x.expand(count, *x.shape[1:]))

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """Join conditions along the batch; they must have the same fields."""

        def join(name: str, *tensors: Tensor) -> Tensor:
            if len({x.shape[1:] for x in tensors}) > 1:
                shapes = " and ".join(str(tuple(x.shape)) for x in tensors)
                raise ValueError(f"condition.{name}: shapes differ; got {shapes}; expected the same but for the batch")
            return torch.cat(tensors)

        return _combine(join, *conditions)

    @staticmethod
    def choose(flags: Tensor, yes: Condition, no: Condition) -> Condition:
        """`yes` where flags (B,) are True and `no` elsewhere, on the device and in the type of `no`."""

        def where(name: str, a: Tensor, b: Tensor) -> Tensor:
            chosen = to_device(flags, b.device).reshape(-1, *[1] * (b.ndim - 1))
            return torch.where(chosen, to_device(a, b.device).to(b.dtype), b)

        return _combine(where, yes, no)


def _combine(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """function(name, *tensors) of the tensors that conditions have in the same place."""
    names = [field.name for field in fields(Condition)]
    return Condition(**{name: _nested(function, name, [getattr(c, name) for c in conditions]) for name in names})


def _nested(function: Callable[..., Tensor], name: str, values: list[Any]) -> Any:
    """The same for one field: None, a tensor, or tensors by name or number."""
    if len({_places(value) for value in values}) > 1:
        raise ValueError(f"condition.{name}: given for some of the batch and not for the rest")
    places = _places(values[0])
    if not isinstance(places, tuple):
        return None if values[0] is None else function(name, *values)
    found = {place: _nested(function, f"{name}.{place}", [value[place] for value in values]) for place in places}
    return found if isinstance(values[0], Mapping) else list(found.values())


def _places(value: Any) -> object:
    """The names or numbers under which a field holds tensors; for a single tensor, whether it is set."""
    if isinstance(value, Mapping):
        return tuple(sorted(value))
    return value is None if value is None or isinstance(value, Tensor) else tuple(range(len(value)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)
