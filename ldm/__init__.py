"""Latent diffusion: both stages, text conditioning, sampling, evaluation and interchange."""

from typing import Any

__version__ = "0.2.0.dev0"

LAZY = {"load": "ldm.pipeline", "Pipeline": "ldm.pipeline"}  # names whose modules import torch


def __getattr__(name: str) -> Any:
    """Import a lazy name when it is first used."""
    if name not in LAZY:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(LAZY[name]), name)
