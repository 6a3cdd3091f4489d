"""Counts what makes a process wait for a device: each time that a tensor becomes numbers of Python or NumPy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
METHODS = {"tolist", "item", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"}
METHODS |= {"__repr__", "__format__", "__contains__"}
OPERATORS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
OPERATORS |= {aten.is_nonzero.default}


class HostReads(AbstractContextManager):
    """`count` of reads inside: by Python's methods (`tolist` and `numpy` call no operator), and by operators alone."""

    def __init__(self) -> None:
        self.count, self.inside = 0, 0
        self.modes = (Methods(self), Operators(self))

    def __enter__(self) -> HostReads:
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class Methods(TorchFunctionMode):
    """Sees what is called on tensors in Python."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") not in METHODS:
            return function(*args, **(kwargs or {}))
        self.reads.count += self.reads.inside == 0
        self.reads.inside += 1  # which may call operators that read
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.reads.inside -= 1


class Operators(TorchDispatchMode):
    """Sees what C++ calls too, such as an optimiser."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = function in OPERATORS or (function is aten.index.Tensor and masked(args[1]))
        self.reads.count += waits and self.reads.inside == 0
        return function(*args, **(kwargs or {}))


def masked(indices: Any) -> bool:
    """True if the size of what is indexed depends on numbers of a mask."""
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
