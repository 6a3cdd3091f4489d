"""Captions as a condition: CLIP as Stable Diffusion 1 reads it, OpenCLIP as 2 does, and an encoder trained along."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition, to_device
from ldm.conditioning import pretrained as stored
from ldm.conditioning.conditioner import Conditioner, repeat
from ldm.conditioning.tokenizer import BPE, Tokenizer, clip_tokenizer, from_folder
from ldm.errors import InputError
from ldm.models.layers import check_positive
from ldm.models.transformer import TextTransformer

if TYPE_CHECKING:
    from ldm.conditioning.t5 import T5Tower


class TruncatedText(UserWarning):
    """The end of a text is not read."""

    def __init__(self, message: str, text: str):
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Tokenization:
    tokenizer: Tokenizer
    length: int
    chunks: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(tokenize(self.tokenizer, texts, self.length, self.chunks))


class Text(Conditioner):
    """Captions through a tokenizer and a text encoder, in one or more chunks of the encoder's length.

    `masked`: tokens after the end are not read, neither by the encoder nor by the backbone. Nothing is the empty text.
    """

    reads = ("caption",)

    def __init__(
        self,
        transformer: TextTransformer | T5Tower,
        tokenizer: Tokenizer | None,
        *,
        chunks: int = 1,
        masked: bool = False,
        drop: float = 0.1,
    ):
        super().__init__("caption", drop)
        check_positive(chunks=chunks)
        if transformer.length < 3:
            raise ValueError(f"length: no room for a word; got {transformer.length}; expected 3 or more; try 77")
        self.weights: str | None = None  # the name that they were read by
        self.unfilled = False  # whether it is to stay as it is, and nobody said with what weights
        self.published = False  # whether its tokenizer comes with its kind, and not with a checkpoint
        self.transformer, self.chunks, self.masked = transformer, chunks, masked
        self.length, self.vocabulary = transformer.length, transformer.tokens.num_embeddings
        self.context = transformer.tokens.embedding_dim
        self.tokenizer: Tokenizer | None = None
        self.nothing: dict[tuple[Any, ...], Condition] = {}  # of what is frozen, by device and precision
        if isinstance(transformer.projection, nn.Linear):
            self.pooled = transformer.projection.out_features
        if tokenizer is not None:
            self.use(tokenizer)

    def use(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer, such as the one that came in a checkpoint."""
        if tokenizer.size > self.vocabulary:
            got, limit = f"{tokenizer.size} ids", self.vocabulary
            raise ValueError(f"vocabulary: too small for the tokenizer; got {got}; expected at most {limit}; try more")
        if self.pooled and tokenizer.end != tokenizer.size - 1:
            got, expected = f"{tokenizer.end} of {tokenizer.size} ids", "the highest, where the pooled vector is read"
            raise ValueError(f"projection: its end token is not found; got {got}; expected {expected}; try none")
        self.tokenizer = tokenizer
        self.nothing.clear()

    def learn(self, captions: Iterable[str]) -> None:
        """Train a tokenizer of the vocabulary's size on captions."""
        self.use(BPE.train(captions, self.vocabulary))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """The ids (B, chunks * length) of texts, on the CPU; what does not fit is cut off, with a warning."""
        return torch.tensor(tokenize(self.known(), texts, self.length, self.chunks))

    def known(self) -> Tokenizer:
        """The tokenizer, which must be there by now."""
        if self.tokenizer is None:
            raise InputError("caption: no tokenizer yet", hint="one learned from captions, or the folder of one")
        return self.tokenizer

    @property
    def room(self) -> int:
        """How many tokens of a text are read, starts and ends not counted."""
        return self.chunks * room(self.known(), self.length)

    def too_long(self, text: str) -> bool:
        """Whether the end of a text is cut off."""
        return len(self.known().encode(text)) > self.room

    def encode(self, ids: Tensor) -> Condition:
        """The states of ids; each chunk is encoded by itself, and the first gives the pooled vector."""
        device = self.transformer.tokens.weight.device
        chunks = to_device(ids, device).unflatten(1, (-1, self.length)).flatten(0, 1)  # (B*K, L)
        mask = self.counts(chunks) if self.masked else None  # (B*K, L)
        states, pooled = self.transformer(chunks, mask)  # (B*K, L, C), (B*K, P)
        tokens = states.unflatten(0, (len(ids), -1)).flatten(1, 2)  # (B, K*L, C)
        mask = None if mask is None else mask.unflatten(0, (len(ids), -1)).flatten(1, 2)  # (B, K*L)
        first = pooled.unflatten(0, (len(ids), -1))[:, 0] if self.pooled else None  # (B, P)
        return Condition(tokens=tokens, mask=mask, pooled=first)

    def counts(self, ids: Tensor) -> Tensor:
        """True up to each row's first end token."""
        ends = (ids == self.known().end).int()  # (B, L)
        return ends.cumsum(1) - ends == 0  # (B, L)

    def tokenizations(self):
        return {self.part: Tokenization(self.known(), self.length, self.chunks)}

    require_tokenizer = known

    @property
    def max_tokens(self):
        return self.room

    def read(self, batch: Mapping[str, Any]) -> Condition:
        ids = batch.get("ids", {}).get(self.part)
        return self.encode(self.tokenize(batch["caption"]) if ids is None else ids)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        return repeat(self.remembered() if self.frozen else self.encode(self.tokenize([""])), count)

    def remembered(self) -> Condition:
        """The empty text's states, encoded once on each device and in each precision."""
        weight = self.transformer.tokens.weight
        kind = weight.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        key = (weight.device, weight.dtype, torch.get_autocast_dtype(kind) if mixed else None)
        if key not in self.nothing:
            with torch.inference_mode(False), torch.no_grad():  # they may be read where gradients are taken
                self.nothing[key] = self.encode(self.tokenize([""]))
        return self.nothing[key]

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.nothing.clear()  # weights are moved or cast
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.nothing.clear()
        super()._load_from_state_dict(*arguments)


def room(tokenizer: Tokenizer, length: int) -> int:
    """How many of a chunk's tokens are the text's own: all but its end, and its start where there is one."""
    return length - 1 - (tokenizer.start is not None)


def texts_in(module: nn.Module | None) -> list[Text]:
    """The text encoders in a module."""
    return [] if module is None else [m for m in module.modules() if isinstance(m, Text)]


def text_in(module: nn.Module | None) -> Text | None:
    """The text encoder in a module, the first one if there are several."""
    return next(iter(texts_in(module)), None)


def carriers(module: nn.Module | None) -> list[Text]:
    """The text encoders whose tokenizer a checkpoint carries; of published kinds only where there is no other."""
    texts = texts_in(module)
    return [text for text in texts if not text.published] or texts[:1]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int, chunks: int = 1) -> list[list[int]]:
    """Rows of ids: per chunk the start, its share of the text, the end, and what fills it up."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"caption: not a list of texts; got {texts!r}; expected a list of str; try [caption]")
    start = [] if tokenizer.start is None else [tokenizer.start]
    own, rows = room(tokenizer, length), []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > own * chunks:
            lost = tokenizer.decode(ids[own * chunks :])
            limit = f"{own * chunks} tokens are read of {len(ids)}"
            message = f"the end of a text is cut off: {limit}; lost: {lost!r}"
            warnings.warn(TruncatedText(message, text), stacklevel=2)
        row = []
        for number in range(chunks):
            chunk = [*start, *ids[number * own : (number + 1) * own], tokenizer.end]
            row += chunk + [tokenizer.pad] * (length - len(chunk))
        rows.append(row)
    return rows


def clip(
    *,
    width: int = 768,  # of its states
    layers: int = 12,  # blocks of attention
    heads: int = 12,  # of attention
    length: int = 77,  # tokens of a chunk, its begin and end among them
    vocabulary: int = 49408,  # tokens that it knows
    projection: int | None = None,  # width of a pooled vector beside the tokens; null has none
    chunks: int = 1,  # that are read of a text, one after the other
    drop: float = 0.1,  # share of samples that lose their text
    weights: str | None = None,  # a folder, a file, a hub's id or random; without it, those of the checkpoint
) -> Text:
    """CLIP's text encoder as Stable Diffusion 1 reads it: the last layer's states, unmasked, filled up with ends.

    `weights` is a folder, a file, a hub's id or random; 75 tokens fit into a chunk; `projection` adds a pooled vector.
    """
    transformer = TextTransformer(
        vocabulary=vocabulary,
        length=length,
        width=width,
        layers=layers,
        heads=heads,
        activation="quick_gelu",
        projection=projection,
    )
    return frozen(transformer, weights, pad_with_end=True, chunks=chunks, drop=drop)


def open_clip(
    *,
    width: int = 1024,  # of its states
    layers: int = 24,  # blocks of attention
    heads: int = 16,  # of attention
    length: int = 77,  # tokens of a chunk, its begin and end among them
    vocabulary: int = 49408,  # tokens that it knows
    chunks: int = 1,  # that are read of a text, one after the other
    drop: float = 0.1,  # share of samples that lose their text
    weights: str | None = None,  # a folder, a file, a hub's id or random; without it, those of the checkpoint
) -> Text:
    """OpenCLIP's text encoder as Stable Diffusion 2 reads it: the last layer but one, normalised; filled up with 0.

    `layers` counts the published ones; the last, which nobody reads, is not built.
    """
    if layers < 2:
        raise ValueError(f"layers: the last one is not read; got {layers}; expected 2 or more; try 24")
    transformer = TextTransformer(
        vocabulary=vocabulary, length=length, width=width, layers=layers - 1, heads=heads, activation="gelu"
    )
    return frozen(transformer, weights, pad_with_end=False, chunks=chunks, drop=drop)


def frozen(transformer: TextTransformer, weights: str | None, pad_with_end: bool, chunks: int, drop: float) -> Text:
    """A published encoder that stays as it is."""
    if named := stored.given(weights):
        stored.load_text(transformer, str(weights))
    published = transformer.tokens.num_embeddings >= 49408  # else a small one, whose tokenizer comes with it
    tokenizer = clip_tokenizer(None if pad_with_end else 0) if published else None
    text = Text(transformer, tokenizer, chunks=chunks, drop=drop)
    text.published, text.weights, text.unfilled = published, weights if named else None, weights is None
    text.freeze()
    return text


def joint_text(
    *,
    width: int = 256,  # of its states
    layers: int = 6,  # blocks of attention
    heads: int = 4,  # of attention
    head_width: int | None = None,  # of each head; null divides the width among them
    length: int = 77,  # tokens that are read of a text, its begin and end among them
    vocabulary: int = 2048,  # tokens that are learned at most
    projection: int | None = None,  # width of a pooled vector beside the tokens; null has none
    masked: bool = True,  # what fills a text up is not seen
    drop: float = 0.1,  # share of samples that lose their text
    tokenizer: str | None = None,  # folder of another's; null learns one from the captions
    weights: str | None = None,  # to begin with: a folder, a file, a hub's id or random
) -> Text:
    """LDM's text encoder, trained along with the backbone: not causal, its queries, keys and values without bias.

    Its tokenizer is learned from captions, or read from the folder of another. `projection` adds a pooled vector, by
    which a small model learns to read sooner. LDM's published text-to-image model is width 1280, 32 layers, 8 heads of
    64, 30522 ids of bert-base-uncased, not masked.
    """
    transformer = TextTransformer(
        vocabulary=vocabulary,
        length=length,
        width=width,
        layers=layers,
        heads=heads,
        head_width=head_width,
        bias=False,
        causal=False,
        projection=projection,
    )
    if stored.given(weights):
        stored.load_text(transformer, str(weights))
    return Text(transformer, None if tokenizer is None else from_folder(tokenizer), masked=masked, drop=drop)
