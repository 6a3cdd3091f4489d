"""Scenes that are drawn and encoded once, so that a proof on one core trains rather than renders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.config import parts
from ldm.data.sampler import SampleId
from ldm.pictures import to_float
from ldm.pipeline import SHIPPED
from ldm.scenes import Scenes

PIECE = 64  # scenes that are drawn at a time
TOLD = ("image", "segmentation", "boxes", "box_labels")


class Remembered:
    """The samples of a file, with the shipped first stage's latents of them."""

    buckets = groups = None

    def __init__(self, *, file: str, batch_size: int, workers: int = 0):
        self.samples, self.batch_size, self.workers = load_file(file), batch_size, workers
        self.sizes = [tuple(self.samples["image"].shape[2:])]

    def __len__(self) -> int:
        return len(self.samples["image"])

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """The samples asked for, whatever the seed."""
        which = torch.tensor([sample_id.index for sample_id in sample_ids])
        told = {name: x[which] for name, x in self.samples.items()}
        return {**told, "number": torch.tensor([sample_id.number for sample_id in sample_ids]), "index": which}


@torch.inference_mode()
def remember(file: Path, count: int, seed: int = 0) -> Path:
    """Write down so many scenes of 64 pixels, each with its map, its boxes and its latents."""
    parts.TABLES["data"].setdefault("remembered", f"{__name__}:Remembered")  # type: ignore[union-attr]
    autoencoder = ldm.load(SHIPPED, device="cpu", precision="fp32").autoencoder
    scenes, rows = Scenes(resolution=64, batch_size=PIECE, adds=["segmentation", "boxes"]), []
    for first in range(0, count, PIECE):
        batch = scenes.batch([SampleId(i, i, 0) for i in range(first, min(first + PIECE, count))], seed)
        rows.append({name: batch[name] for name in TOLD} | {"latents": autoencoder.encode(to_float(batch["image"]))})
    save_file({name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}, file)
    return file
