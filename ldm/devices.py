"""Where networks compute and in what precision, or one line that says why not."""

from __future__ import annotations

import os

import torch
from torch import nn

from ldm.errors import InputError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def placement(device: str, precision: str) -> tuple[torch.device, torch.dtype | None]:
    """A device and the precision that suits it, or why not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        where = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device: cannot be used here", "", device, "auto, cpu, cuda or mps", "cpu") from error
    if precision == "auto":
        precision = "bf16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision not in DTYPES:
        raise InputError("precision: unknown", "", precision, f"auto, {', '.join(DTYPES)}")
    return where, DTYPES[precision]


def place(module: nn.Module, device: torch.device, offload: bool) -> None:
    """On the device for good, or only while it computes."""
    if not offload:
        module.to(device)
        return
    from accelerate import cpu_offload

    cpu_offload(module, device)
