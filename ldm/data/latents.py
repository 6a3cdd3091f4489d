"""Latents and text states from a cache that `ldm cache` wrote: shards are mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint.files import DIGEST, open_file
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.pretrained import digest
from ldm.conditioning.text import Text
from ldm.data.images import uniforms
from ldm.data.sampler import SampleId
from ldm.errors import CheckpointError, DataError, shown
from ldm.models.autoencoder import Autoencoder
from ldm.models.layers import check_not_negative, check_positive

MANIFEST, FORMAT = "cache.json", 1
FIELDS = ("tokens", "mask", "pooled")  # fields of a Condition that a text encoder gives
NOT_STATES = ("drop", "null", "weights", "tokenizer")  # keys that do not change states, or that digests stand for
AGAIN = "`ldm cache` into another folder, or into this one after emptying it"

Shard = dict[str, Tensor]


class Pick(NamedTuple):
    """One sample of a batch: its shard and row, whether its picture is flipped, and its caption."""

    shard: Shard
    row: int
    flipped: int
    caption: int

    def span(self, name: str, offsets: str) -> Tensor:
        """The caption's part of a tensor that holds all captions, one after the other."""
        begin, end = self.shard[offsets][self.caption : self.caption + 2].tolist()
        return self.shard[name][begin:end]


class Latents:
    """A cache as data: latents instead of pictures, `states` instead of captions for frozen text encoders.

    Samples have the index and the bucket that they have in the source, so a run has the same order as one on pictures.
    """

    groups = None

    def __init__(
        self,
        *,
        root: str,  # folder that `ldm cache` wrote
        batch_size: int,  # per step, over all processes
        workers: int = 0,  # loader processes for each training process
    ):
        check_positive(batch_size=batch_size)
        check_not_negative(workers=workers)
        self.root, self.batch_size, self.workers = Path(root), batch_size, workers
        manifest = read_manifest(self.root)
        self.key, self.files = manifest["key"], manifest["shards"]
        self.digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        self.sizes = [(height, width) for height, width in self.key["sizes"]]
        self.shards: dict[int, Shard] = {}
        self.rows_of = np.empty((self.key["count"], 2), np.int32)  # shard and row of each sample
        for number in range(len(self.files)):
            index = self.shard(number)["index"].numpy()
            self.rows_of[index] = np.stack((np.full(len(index), number), np.arange(len(index))), 1)
        bucket_of = np.array([row["bucket"] for row in self.files])
        self.buckets = bucket_of[self.rows_of[:, 0]] if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return self.key["count"]

    @property
    def kind(self) -> str:
        """The kind of data that the cache was made from."""
        return self.key.get("data", {}).get("type", "latents")

    @property
    def labels(self) -> Tensor:
        """The different labels."""
        return torch.cat([self.shard(number)["label"].unique() for number in range(len(self.files))]).unique()

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped shards, which a worker process maps itself."""
        return {**self.__dict__, "shards": {}}

    def shard(self, number: int) -> Shard:
        """The tensors of a shard; memory is taken by the pages that are read."""
        if number not in self.shards:
            row = self.files[number]
            path, hint = self.root / row["file"], "`ldm cache` again, which rewrites that shard"
            try:
                tensors = open_file(path)
            except CheckpointError as error:
                raise DataError(f"the cache is damaged: {error}", hint=hint) from error
            if tensors.metadata.get(DIGEST) != row[DIGEST]:
                raise DataError("a shard of another cache", str(path), expected=f"sha256 {row[DIGEST][:10]}", hint=hint)
            self.shards[number] = dict(tensors)
        return self.shards[number]

    def check(self, autoencoder: Autoencoder, conditioner: Conditioner | None, node: Mapping[str, Any] | None) -> None:
        """Refuse a cache of another autoencoder or other text encoders, or without what the conditioner reads."""
        texts, keeps = identities(conditioner, node)
        wanted: dict[str, Any] = {"autoencoder": autoencoder.fingerprint(), "texts": texts}
        found = {name: identity for name, identity in self.key["texts"].items() if name in texts}
        compare({"autoencoder": self.key["autoencoder"], "texts": found}, wanted, self.root)
        if missing := [name for name in keeps if name not in self.key["keeps"]]:
            raise DataError(f"the cache has no {missing[0]}, which the conditioner reads", str(self.root), hint=AGAIN)

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """Latents (B, Z, h, w) in float32 with text states in the type that they are stored in."""
        picks = self.picks(sample_ids, seed)
        batch: dict[str, Any] = {
            "number": torch.tensor([sample_id.number for sample_id in sample_ids]),
            "index": torch.tensor([sample_id.index for sample_id in sample_ids]),
            "latents": torch.stack([pick.shard["latents"][pick.row, pick.flipped] for pick in picks]).float(),
        }
        for name in ("original_size", "crop", *(name for name in self.key["keeps"] if name == "label")):
            batch[name] = torch.stack([pick.shard[name][pick.row] for pick in picks])
        if self.key["texts"]:
            batch["states"] = {name: states(picks, name) for name in self.key["texts"]}
        if "caption" in self.key["keeps"]:
            batch["caption"] = [pick.span("text", "text.offsets").numpy().tobytes().decode() for pick in picks]
        return batch

    def picks(self, sample_ids: Sequence[SampleId], seed: int) -> list[Pick]:
        """Where each sample is stored; its flip and caption are drawn by its number."""
        numbers, rows = self.rows_of[[sample_id.index for sample_id in sample_ids]].T.tolist()
        shards = [self.shard(number) for number in numbers]
        ends = [shard["captions"][row : row + 2].tolist() for shard, row in zip(shards, rows)]
        if self.key["flip"] or any(last - first > 1 for first, last in ends):
            u = uniforms(sample_ids, seed)
        else:
            u = [[0.0, 1.0, 0.0, 0.0]] * len(sample_ids)
        return [
            Pick(shard, row, int(self.key["flip"] and mirror < 0.5), first + int(which * (last - first)))
            for shard, row, (first, last), (which, mirror, *_) in zip(shards, rows, ends, u)
        ]


def states(picks: Sequence[Pick], name: str) -> dict[str, Tensor]:
    """A text encoder's states for a batch, as the fields of a Condition; masked tokens are zeros."""
    fields = [field for field in FIELDS if f"{name}.{field}" in picks[0].shard]
    masked = "mask" in fields
    dense = [field for field in fields if field != "tokens" or not masked]
    found = {field: torch.stack([pick.shard[f"{name}.{field}"][pick.caption] for pick in picks]) for field in dense}
    if masked:
        spans = [pick.span(f"{name}.tokens", f"{name}.offsets") for pick in picks]  # (n, C) each
        found["tokens"] = spans[0].new_zeros(*found["mask"].shape, spans[0].shape[1])  # (B, L, C)
        found["tokens"][found["mask"]] = torch.cat(spans)
    return found


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a cache; it is written last, so a folder without one is unfinished."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        started = next(root.glob("*.safetensors"), None) is not None
        what = "the cache is not finished" if started else "no cache"
        raise DataError(what, str(root), expected=MANIFEST, hint=f"`ldm cache --out {root}`") from None
    except (OSError, ValueError) as error:
        raise DataError("the cache's manifest is damaged", str(path), str(error), hint="`ldm cache` again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise DataError("a cache of another version", str(path), f"format {shown(version)}", str(FORMAT), AGAIN)
    return manifest


def leaf_nodes(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The nodes of a conditioner's leaves, in the order of `Conditioner.leaves`."""
    return [leaf for part in node["parts"] for leaf in leaf_nodes(part)] if "parts" in node else [node]


def frozen_texts(conditioner: Conditioner | None, node: Any) -> dict[str, tuple[Text, Mapping[str, Any]]]:
    """The text encoders whose states can be cached, with their nodes, by part."""
    found = zip(conditioner.leaves(), leaf_nodes(node), strict=True) if conditioner is not None else ()
    return {name: (leaf, own) for (name, leaf), own in found if isinstance(leaf, Text) and leaf.frozen}


def identities(conditioner: Conditioner | None, node: Any) -> tuple[dict[str, Any], list[str]]:
    """What each frozen text encoder's states depend on, and what the other parts read from a batch."""
    texts = frozen_texts(conditioner, node)
    leaves = conditioner.leaves() if conditioner is not None else ()
    others = [key for name, leaf in leaves if name not in texts for key in leaf.reads]
    return {name: identity(*text) for name, text in texts.items()}, list(dict.fromkeys(others))


def identity(text: Text, node: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's settings, and digests of its weights and its tokenizer."""
    settings = {name: value for name, value in node.items() if name not in NOT_STATES}
    tokenizer = hashlib.sha256(text.require_tokenizer().to_json().encode()).hexdigest()
    return {**settings, "weights": digest(text.transformer), "tokenizer": tokenizer}


def compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse a stale cache, naming all that differs."""
    before, now = flat(stored), flat(wanted)
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    if names:
        first, others = names[0], f" ({', '.join(names[1:])} too)" * (len(names) > 1)
        got, expected = (short(values.get(first)) for values in (before, now))
        raise DataError(f"the cache is stale: {first} differs{others}", str(path), got, expected, AGAIN)


def short(value: Any) -> str:
    """A value as an error shows it; a digest by its first digits."""
    return value[:10] if isinstance(value, str) and len(value) == 64 else shown(value)


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names."""
    if not isinstance(values, Mapping):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}


def read_key(path: Path) -> dict[str, Any] | None:
    """The key in a shard's metadata, or None if there is no complete shard."""
    try:
        return json.loads(open_file(path).metadata["cache"])
    except (CheckpointError, KeyError, ValueError):
        return None
