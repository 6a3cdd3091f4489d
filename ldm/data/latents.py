"""Latents and text states from a cache that `ldm cache` wrote: shards mapped into memory, read a batch at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint.files import DIGEST, open_file
from ldm.conditioning.compose import Compose
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.pretrained import digest
from ldm.conditioning.text import Text
from ldm.data.images import uniforms
from ldm.data.sampler import SampleId
from ldm.errors import CheckpointError, DataError, shown
from ldm.models.autoencoder import Autoencoder
from ldm.models.layers import check_positive

MANIFEST, FORMAT = "cache.json", 1
FIELDS = ("tokens", "mask", "pooled")  # of a Condition, what a text encoder gives
NOT_STATES = (
    "drop",
    "null",
    "weights",
    "tokenizer",
)  # of a text encoder's node: not in its states
AGAIN = "`ldm cache` into another folder, or into this one once it is empty"

Shard = dict[str, Tensor]


class Pick(NamedTuple):
    """One sample of a batch: its shard and row there, whether its picture was flipped, and which caption it has."""

    shard: Shard
    row: int
    flipped: int
    caption: int


class Latents:
    """A cache as data: latents instead of pictures, and `states` instead of the captions of frozen text encoders.

    Sample i is the source's sample i in the source's bucket, so that the order of a run is that of a run on pictures.
    """

    groups = None

    def __init__(
        self,
        *,
        root: str,  # folder that `ldm cache` wrote
        batch_size: int,  # of a step, on all processes together
        workers: int = 0,  # processes that read, for each that trains
    ):
        check_positive(batch_size=batch_size)
        if workers < 0:
            raise ValueError(f"workers: negative; got {workers}; expected 0 or more; try 0")
        self.root, self.batch_size, self.workers = Path(root), batch_size, workers
        manifest = read_manifest(self.root)
        self.key, self.rows = manifest["key"], manifest["shards"]
        self.digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        self.sizes = [(height, width) for height, width in self.key["sizes"]]
        self.opened: dict[int, Shard] = {}
        self.place = np.empty((self.key["count"], 2), np.int32)  # of each sample its shard and its row there
        for number in range(len(self.rows)):
            index = self.shard(number)["index"].numpy()
            self.place[index] = np.stack((np.full(len(index), number), np.arange(len(index))), 1)
        of_shard = np.array([row["bucket"] for row in self.rows])
        self.buckets = of_shard[self.place[:, 0]] if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return self.key["count"]

    @property
    def kind(self) -> str:
        """The kind of data that the cache was made from."""
        return self.key.get("data", {}).get("type", "latents")

    @property
    def labels(self) -> Tensor:
        """Those that there are."""
        return torch.cat([self.shard(number)["label"].unique() for number in range(len(self.rows))]).unique()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is told; it maps the shards itself."""
        return {**self.__dict__, "opened": {}}

    def shard(self, number: int) -> Shard:
        """The tensors of a shard, which costs no memory but the pages that are read."""
        if number not in self.opened:
            row = self.rows[number]
            path, hint = self.root / row["file"], "`ldm cache` again, which makes that shard anew"
            try:
                tensors = open_file(path)
            except CheckpointError as error:
                raise DataError(f"the cache is damaged: {error}", hint=hint) from error
            if tensors.metadata.get(DIGEST) != row[DIGEST]:
                raise DataError("another cache's shard", str(path), expected=f"sha256 {row[DIGEST][:10]}", hint=hint)
            self.opened[number] = dict(tensors)
        return self.opened[number]

    def check(self, autoencoder: Autoencoder, conditioner: Conditioner | None, node: Mapping[str, Any] | None) -> None:
        """Refuse a cache of another first stage, of other text encoders, or without what else the conditioner reads."""
        texts, keeps = identities(conditioner, node)
        wanted: dict[str, Any] = {"autoencoder": autoencoder.fingerprint(), "texts": texts}
        found = {name: identity for name, identity in self.key["texts"].items() if name in texts}
        compare({"autoencoder": self.key["autoencoder"], "texts": found}, wanted, self.root)
        if lost := [name for name in keeps if name not in self.key["keeps"]]:
            raise DataError(f"the cache has no {lost[0]}, which the conditioner reads", str(self.root), hint=AGAIN)

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """A batch, with latents (B, Z, h, w) in float32 and text states in the type that they are stored in."""
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
            batch["caption"] = [caption(pick) for pick in picks]
        return batch

    def picks(self, sample_ids: Sequence[SampleId], seed: int) -> list[Pick]:
        """The samples that are asked for, each as its number draws it."""
        numbers, rows = self.place[[sample_id.index for sample_id in sample_ids]].T.tolist()
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
    """A text encoder's states for a batch, as the fields of a Condition; where its mask says so there are zeros."""
    fields = [field for field in FIELDS if f"{name}.{field}" in picks[0].shard]
    masked = "mask" in fields
    whole = [field for field in fields if field != "tokens" or not masked]
    found = {field: torch.stack([pick.shard[f"{name}.{field}"][pick.caption] for pick in picks]) for field in whole}
    if masked:
        spans = [span(pick, name) for pick in picks]
        found["tokens"] = spans[0].new_zeros(*found["mask"].shape, spans[0].shape[1])  # (B, L, C)
        found["tokens"][found["mask"]] = torch.cat(spans)
    return found


def span(pick: Pick, name: str) -> Tensor:
    """The states (n, C) of those tokens of a caption that count."""
    begin, end = pick.shard[f"{name}.offsets"][pick.caption : pick.caption + 2].tolist()
    return pick.shard[f"{name}.tokens"][begin:end]


def caption(pick: Pick) -> str:
    """A caption as it was written."""
    begin, end = pick.shard["text.offsets"][pick.caption : pick.caption + 2].tolist()
    return pick.shard["text"][begin:end].numpy().tobytes().decode()


def read_manifest(root: Path) -> dict[str, Any]:
    """What is written last, and makes a folder a cache."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = next(root.glob("*.safetensors"), None) is not None
        what = "the cache is not finished" if begun else "no cache"
        raise DataError(what, str(root), expected=MANIFEST, hint="`ldm cache --out` this folder") from None
    except (OSError, ValueError) as error:
        raise DataError("the cache's manifest is damaged", str(path), str(error), hint="`ldm cache` again") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if written != FORMAT:
        raise DataError("another version's cache", str(path), f"format {shown(written)}", str(FORMAT), AGAIN)
    return manifest


def leaves(conditioner: Conditioner | None, node: Any) -> Iterator[tuple[str, Conditioner, dict[str, Any]]]:
    """The conditioners that read something, each with the name of its part in the whole and its node."""
    if isinstance(conditioner, Compose):
        for member, names, inner in zip(conditioner.members, conditioner.names, node["parts"]):
            here = dict(names)
            yield from ((here[name], leaf, own) for name, leaf, own in leaves(member, inner))  # type: ignore[arg-type]
    elif conditioner is not None:
        yield conditioner.part, conditioner, node


def frozen_texts(conditioner: Conditioner | None, node: Any) -> dict[str, tuple[Text, dict[str, Any]]]:
    """The text encoders whose states can be cached, by their names in the whole."""
    found = leaves(conditioner, node)
    return {name: (leaf, own) for name, leaf, own in found if isinstance(leaf, Text) and leaf.frozen}


def identities(conditioner: Conditioner | None, node: Any) -> tuple[dict[str, Any], list[str]]:
    """What each frozen text encoder's states depend on, and the keys of a batch that the other parts read."""
    texts = frozen_texts(conditioner, node)
    others = [key for name, leaf, _ in leaves(conditioner, node) if name not in texts for key in leaf.reads]
    return {name: identity(*text) for name, text in texts.items()}, list(dict.fromkeys(others))


def identity(text: Text, node: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's numbers, and digests of its weights and its tokenizer."""
    numbers = {name: value for name, value in node.items() if name not in NOT_STATES}
    tokenizer = hashlib.sha256(text.require_tokenizer().to_json().encode()).hexdigest()
    return {**numbers, "weights": digest(text.transformer), "tokenizer": tokenizer}


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Refuse a stale cache: all that differs is named, and of the first its two values."""
    ours, theirs = flat(wanted), flat(found)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        first, others = names[0], f" ({', '.join(names[1:])} too)" * (len(names) > 1)
        got, expected = (short(values.get(first)) for values in (theirs, ours))
        raise DataError(f"the cache is stale: {first} differs{others}", str(where), got, expected, AGAIN)


def short(value: Any) -> str:
    """A value as an error shows it; of a digest its first digits are enough."""
    return value[:10] if isinstance(value, str) and len(value) == 64 else shown(value)


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names."""
    if not isinstance(values, Mapping):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}


def read_key(path: Path) -> dict[str, Any] | None:
    """What a shard says that it depends on; None where there is no whole shard."""
    try:
        return json.loads(open_file(path).metadata["cache"])
    except (CheckpointError, KeyError, ValueError):
        return None
