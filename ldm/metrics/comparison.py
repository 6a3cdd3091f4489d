"""How far made pictures are from true ones as a whole, by features of both; those of true ones are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import check_digest, open_file, write_file
from ldm.data.loader import Data, Loader
from ldm.data.sampler import SampleId, by_bucket
from ldm.distributed import Rows, broadcast, map_batches, torchrun_rank
from ldm.errors import DataError, LdmError
from ldm.metrics.classes import PARTS, inception_score
from ldm.metrics.features import Features, as_saved
from ldm.metrics.frechet import Moments, frechet_distance
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.prdc import NEIGHBOURS, prdc
from ldm.pictures import to_float

ENOUGH = 5  # samples per dimension, below which a Frechet distance is little more than its bias
FORMAT = 2  # raised whenever the same names come to stand for other numbers


def read(features: Features, x: Tensor) -> Rows:
    """The features of pictures (B, 3, H, W) in [-1, 1], as they would be saved, on the CPU."""
    device = next(features.network.parameters()).device
    with torch.inference_mode():
        seen = features(as_saved(x).to(device))
    return {name: values.float().cpu() for name, values in seen._asdict().items() if values is not None}


def batches(data: Data, indices: Sequence[int]) -> list[list[SampleId]]:
    """Asks for these samples of a source, which are all of one size."""
    if len(data.sizes) > 1:
        got = f"{len(data.sizes)} sizes"
        raise DataError("pictures of several sizes cannot be compared", "data.aspect", got, "one", "data.aspect=1")
    return list(by_bucket(indices, data.batch_size, data.buckets))


def each(
    data: Data, indices: Sequence[int], seed: int, work: Callable[[Rows, list[SampleId]], Rows], what: str
) -> Rows:
    """work(batch, asks) of these samples, the batches made ahead where the data have workers."""
    asked = batches(data, indices)
    rank = torchrun_rank()
    made = iter(Loader(data, seed, asked[rank.number :: rank.of]))
    return map_batches(asked, lambda sample_ids: work(next(made), sample_ids), rank, what)


def true_features(features: Features, data: Data, indices: Sequence[int], seed: int, about: dict[str, Any]) -> Rows:
    """Of these samples of a source that `about` describes: from the cache, or read now and kept there."""
    digest, which = getattr(data, "digest", ""), [int(index) for index in indices]
    key = [FORMAT, features.identity, features.resize, about, digest, seed, which]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache() / f"{name}.safetensors"
    rank = torchrun_rank()
    kept = broadcast(known(file) if rank.number == 0 else None, rank)  # all must take the same branch
    if kept is not None:
        return kept
    found = each(data, indices, seed, lambda batch, _: read(features, to_float(batch["image"])), "true pictures")
    if rank.number == 0:
        keep(file, found, {"features": features.identity, "data": json.dumps(about)})
    return found


def cache() -> Path:
    """Where features of true pictures are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "features"


def known(file: Path) -> Rows | None:
    """What was kept, unless it is damaged."""
    try:
        check_digest(file)
        return {name: x.clone() for name, x in open_file(file).items()}
    except (LdmError, OSError, KeyError):
        return None


def keep(file: Path, found: Rows, about: dict[str, str]) -> None:
    """For the next time; where nothing can be written, there is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, found, about)
    except (LdmError, OSError) as error:
        warnings.warn(f"features are not kept: {error}", stacklevel=2)


def compared(true: Rows, made: Rows, seed: int = 0) -> dict[str, Any]:
    """All distances that these features allow, by name, and which of them are indicative only."""
    a, b = true["vectors"], made["vectors"]
    count, width = min(len(a), len(b)), a.shape[1]
    found: dict[str, Any] = {"true": len(a), "made": len(b), "frechet": frechet(a, b)}
    if "spatial" in made:
        found["sfrechet"] = frechet(true["spatial"], made["spatial"])
    if count >= 4:
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
