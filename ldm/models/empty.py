"""Networks on the meta device, without memory, to be filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "zero_", "fill_"}


class Unfilled(TorchFunctionMode):
    """Skip initialisation on the meta device, where it would only import torch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(function, "__name__", "") in FILLS and tensor.is_meta:
            return tensor
        return function(*args, **kwargs)


@contextmanager
def empty() -> Iterator[None]:
    """Inside, networks are built on the meta device, which is fast."""
    with torch.device("meta"), Unfilled():
        yield
