"""Latent diffusion: both stages, text conditioning, sampling, evaluation and interchange."""

from typing import Any

__version__ = "0.1.0"

LAZY = {"load": "ldm.pipeline", "Pipeline": "ldm.pipeline"}  # names that cost an import of torch


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for."""
    if name not in LAZY:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(LAZY[name]), name)
