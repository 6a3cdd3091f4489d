"""How far made pictures are from true ones as a whole, by features of both; those of true ones are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import check_digest, open_file, write_file
from ldm.data.loader import Data
from ldm.data.sampler import Ask, grouped
from ldm.errors import DataError
from ldm.metrics.classes import PARTS, inception_score
from ldm.metrics.features import Features, as_saved
from ldm.metrics.frechet import Moments, frechet_distance
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.prdc import NEIGHBOURS, prdc
from ldm.metrics.sharing import Rows, rank, shared
from ldm.pictures import to_float

BATCH = 50
ENOUGH = 5  # samples per dimension, below which a Frechet distance is little more than its bias
FORMAT = 1


def read(features: Features, x: Tensor) -> Rows:
    """The features of pictures (B, 3, H, W) in [-1, 1], as they would be saved, on the CPU."""
    device = next(features.network.parameters()).device
    with torch.inference_mode():
        seen = features(as_saved(x).to(device))
    return {name: values.float().cpu() for name, values in seen._asdict().items() if values is not None}


def batches(data: Data, indices: Sequence[int]) -> list[list[Ask]]:
    """Asks for these samples of a source, all of one size."""
    if len(data.sizes) > 1:
        got = f"{len(data.sizes)} sizes"
        raise DataError("pictures of several sizes cannot be compared", "data.aspect", got, "one", "data.aspect=1")
    return list(grouped(indices, BATCH, data.buckets))


def true_features(features: Features, data: Data, indices: Sequence[int], seed: int, about: dict[str, Any]) -> Rows:
    """Of these samples of a source that `about` describes: from the cache, or read now and kept there."""
    digest = getattr(data, "digest", f"seed {seed}")  # scenes are a function of the seed
    key = [FORMAT, features.identity, about, digest, [int(i) for i in indices]]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache() / f"{name}.safetensors"
    if file.is_file():
        check_digest(file)
        return dict(open_file(file))

    def work(asks: list[Ask]) -> Rows:
        """Of one batch."""
        return read(features, to_float(data.batch(asks, seed)["image"]))

    found = shared(batches(data, indices), work, "true pictures")
    if rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, found, {"features": features.identity, "data": json.dumps(about)})
    return found


def cache() -> Path:
    """Where features of true pictures are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "features"


def compared(true: Rows, made: Rows, seed: int = 0) -> dict[str, Any]:
    """All distances that these features allow, by name, and which of them are indicative only."""
    a, b = true["vectors"], made["vectors"]
    count, width = min(len(a), len(b)), a.shape[1]
    found: dict[str, Any] = {"true": len(a), "made": len(b), "frechet": frechet(a, b)}
    if "spatial" in made:
        found["sfrechet"] = frechet(true["spatial"], made["spatial"])
    found["kernel"] = kernel_distance(a, b, seed=seed)._asdict()
    if "logits" in made and len(made["logits"]) >= PARTS:
        found["inception_score"] = inception_score(made["logits"])._asdict()
    if count > NEIGHBOURS:
        found |= prdc(a, b)._asdict()
    found["indicative"] = count < ENOUGH * width
    return found


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between two sets (N, D), (M, D)."""
    return frechet_distance(Moments.of(a), Moments.of(b))
