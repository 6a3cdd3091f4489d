"""The captions of training data: tokenizers are learned from them, and notes say how many are too long."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ldm.conditioning.text import text_in, texts_in, tokenizer_owners
from ldm.config.schema import Config
from ldm.data.loader import Data
from ldm.data.sampler import by_bucket, evenly_spaced
from ldm.errors import InputError

MOST, MOST_READ = 20_000, 1024  # captions to learn from: if they are in memory, and if each costs a picture
BATCH = 32  # pictures that are read at a time for their captions
MEASURED = 1000  # captions whose lengths are measured


def learn_tokenizers(conditioner: nn.Module | None, data: Data, config: Config) -> None:
    """Train a tokenizer for every text encoder that has none; a checkpoint can store only one."""
    new = [text for text in texts_in(conditioner) if text.tokenizer is None]
    captions = captions_of(data, config["seed"]) if new else []
    for text in new:
        text.learn(captions)
    if len(known := tokenizers(conditioner)) > 1:
        what, got = "conditioner: a checkpoint stores one tokenizer", f"{len(known)} that differ"
        hint = "the same vocabulary for all encoders that learn theirs"
        raise config.source.error(what, "conditioner", got=got, expected="one", hint=hint)


def tokenizers(conditioner: nn.Module | None) -> list[str]:
    """The different tokenizers that a checkpoint has to store, as JSON."""
    return list(dict.fromkeys(text.require_tokenizer().to_json() for text in tokenizer_owners(conditioner)))


def captions_of(data: Data, seed: int, count: int = MOST) -> list[str]:
    """Captions of samples spread over a source; fewer if each costs a picture."""
    if captions := getattr(data, "captions", None):
        return [text for index in evenly_spaced(len(data), count) for text in captions(index)]
    found: list[str] = []
    for sample_ids in by_bucket(evenly_spaced(len(data), min(count, MOST_READ)), BATCH, data.buckets):
        batch = data.batch(sample_ids, seed)
        if "caption" not in batch:
            what, got = "conditioner: its tokenizer is learned from captions", ", ".join(batch)
            raise InputError(what, "data", got, "captions", "tokenizer: FOLDER")
        found += batch["caption"]
    return found


def length_notes(conditioner: nn.Module | None, data: Data, seed: int) -> Iterator[str]:
    """How many captions are truncated."""
    text = text_in(conditioner)
    captions = captions_of(data, seed, MEASURED) if text and hasattr(data, "captions") else []
    if text and (longer := sum(map(text.tokenization.truncates, captions))):
        share = longer / len(captions)
        yield f"captions: {share:.0%} are truncated to the text encoder's {text.tokenization.max_tokens} tokens"
