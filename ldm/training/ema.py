"""The exponential moving average of weights, in float32 whatever the weights are trained in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Shadows of trainable parameters by name, each moved by 1 - decay towards its parameter at every step.

    Early on the decay is (1 + step) / (10 + step), as in LDM, so that the first weights are soon forgotten.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        decay: float = 0.9999,  # share of the average that a step keeps
    ):
        if not 0 <= decay < 1:
            raise ValueError(f"decay: out of range; got {decay}; expected 0 <= decay < 1; try 0.9999")
        self.decay = decay
        self.parameters = dict(parameters)
        self.shadows = {name: p.detach().clone().to(at_least_float32(p)) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters after their optimiser step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows = list(self.shadows.values())
        targets = [p.detach().to(s.dtype) for p, s in zip(self.parameters.values(), shadows)]
        if shadows:
            torch._foreach_lerp_(shadows, targets, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the place of the weights, which come back bit for bit."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.shadows[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])


def at_least_float32(x: Tensor) -> torch.dtype:
    """The type that averages are kept in: a bfloat16 average at 0.9999 does not move."""
    return torch.promote_types(x.dtype, torch.float32)
