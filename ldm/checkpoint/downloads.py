"""Weights that others published and that we may not ship, and where torch's cache keeps them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Weights(NamedTuple):
    """A file of weights: its purpose, its name, its URL or the package that knows it, and its sha256."""

    purpose: str
    file: str
    url: str
    sha256: str


DOWNLOADS = {
    "vgg16": Weights(
        "the perceptual loss and LPIPS",
        "vgg16-397923af.pth",
        "torchvision",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "inception": Weights(
        "FID, KID and precision",
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}


def cached(weights: Weights) -> Path:
    """The path at which torch, torchvision and torchmetrics look for a file."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return Path(home).expanduser() / "hub" / "checkpoints" / weights.file
