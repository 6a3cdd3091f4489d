"""Devices and precisions of networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def placement(device: str, precision: str) -> tuple[torch.device, torch.dtype | None]:
    """The device and the dtype of autocast (None: float32) by their names; `auto` picks the best available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        placed = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
        )
        torch.empty(0, device=placed)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device: cannot be used here", "", device, "auto, cpu, cuda or mps", "cpu") from error
    if precision == "auto":
        native = placed.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    if precision not in DTYPES:
        raise InputError("precision: unknown", "", precision, f"auto, {', '.join(DTYPES)}")
    if placed.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # convolutions in full float32, like matrix products
    return placed, DTYPES[precision]


class Placed:
    """Networks on a device in a precision; with `offload`, their weights are there only while they compute."""

    def __init__(
        self,
        networks: Iterable[nn.Module | None],
        device: torch.device,
        dtype: torch.dtype | None,  # of autocast
        offload: bool,
    ):
        self.device, self.dtype, self.offload = device, dtype, offload
        for network in filter(None, () if offload else networks):
            network.to(device)

    @contextmanager
    def on_device(self, *networks: nn.Module | None) -> Iterator[None]:
        """A context in which offloaded networks have their weights on the device."""
        with ExitStack() as stack:
            for network in filter(None, networks if self.offload else ()):
                stack.enter_context(visiting(network, self.device))
            yield

    @property
    def precision(self) -> str:
        """The name of the precision, as `load` takes it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def to_device(self, x: Tensor) -> Tensor:
        """Move a tensor to the device."""
        return x.to(self.device)

    def autocast(self) -> AbstractContextManager:
        """A context of the networks' precision; the sampler's state stays in float32."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace a module's weights by copies on a device for a while."""
    tables: list[dict[str, Any]] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    home = [(table, name, x) for table in tables for name, x in table.items() if x is not None]
    try:
        with torch.inference_mode(False):
            away = {id(x): x.detach().to(device) for _, _, x in home}
        for table, name, x in home:
            table[name] = nn.Parameter(away[id(x)], x.requires_grad) if isinstance(x, nn.Parameter) else away[id(x)]
        yield
    finally:
        for table, name, x in home:
            table[name] = x
