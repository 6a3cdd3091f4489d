"""Captions as a condition: CLIP as in Stable Diffusion 1, OpenCLIP as in 2, and an encoder trained along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.condition import Condition, to_device
from ldm.conditioning import pretrained
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.tokenization import Tokenization
from ldm.conditioning.tokenizer import BPE, Tokenizer, clip_tokenizer, from_folder
from ldm.errors import InputError
from ldm.models.layers import check_positive
from ldm.models.transformer import TextTransformer

Null = Literal["empty", "zeros"]


class Text(Conditioner):
    """Captions through a tokenizer and a text encoder, in one or more chunks of the encoder's length.

    `transformer` has a TextTransformer's interface. `masked`: neither the encoder nor the backbone reads tokens after
    the end. The null is the empty text, or zeros as in SDXL.
    """

    reads = ("caption",)

    def __init__(
        self,
        transformer: Any,
        tokenizer: Tokenizer | None,
        *,
        chunks: int = 1,
        masked: bool = False,
        drop: float = 0.1,
        null: Null = "empty",
    ):
        super().__init__("caption", drop)
        check_positive(chunks=chunks)
        if transformer.length < 3:
            raise ValueError(f"length: too short for a word; got {transformer.length}; expected 3 or more; try 77")
        self.weights: str | None = None  # the folder, file or id that the weights were read from
        self.needs_weights = False  # True if it is frozen and has no weights yet
        self.standard_tokenizer = False  # True if the tokenizer is CLIP's, which no checkpoint has to store
        self.transformer, self.chunks, self.masked, self.null_policy = transformer, chunks, masked, null
        self.length, self.vocabulary = transformer.length, transformer.tokens.num_embeddings
        self.context = self.width = transformer.tokens.embedding_dim
        self.tokenizer: Tokenizer | None = None
        self.empty: Tensor | None = None
        self.null_cache: dict[tuple[Any, ...], Condition] = {}  # of a frozen encoder, by device and precision
        if isinstance(transformer.projection, nn.Linear):
            self.pooled = transformer.projection.out_features
        if tokenizer is not None:
            self.use(tokenizer)

    def use(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer."""
        if tokenizer.size > self.vocabulary:
            size, got = tokenizer.size, self.vocabulary
            raise ValueError(
                f"vocabulary: smaller than the tokenizer's; got {got}; expected {size} or more; try {size}"
            )
        if self.pooled and tokenizer.end != tokenizer.size - 1:
            end, expected = tokenizer.end, tokenizer.size - 1  # the pooled vector is read at the highest id
            raise ValueError(f"projection: the end token must have the highest id; got {end}; expected {expected}")
        self.tokenizer = tokenizer
        self.empty = None
        self.null_cache.clear()

    def learn(self, captions: Iterable[str]) -> None:
        """Train a tokenizer of the vocabulary's size on captions."""
        self.use(BPE.train(captions, self.vocabulary))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an error if there is none yet."""
        if self.tokenizer is None:
            raise InputError(
                "caption: no tokenizer yet", hint="conditioner.tokenizer=FOLDER, or learning one from captions"
            )
        return self.tokenizer

    @property
    def tokenization(self) -> Tokenization:
        """How captions become token ids."""
        return Tokenization(self.require_tokenizer(), self.length, self.chunks)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """The ids (B, chunks * length) of texts, on the CPU."""
        return self.tokenization(texts)

    def encode(self, ids: Tensor) -> Condition:
        """The states of ids; each chunk is encoded separately, and the first gives the pooled vector."""
        chunks = to_device(ids, self.transformer.tokens.weight.device)
        chunks = chunks.unflatten(1, (-1, self.length)).flatten(0, 1)  # (B*K, L)
        mask = self.attention_mask(chunks) if self.masked else None  # (B*K, L)
        states, pooled = self.transformer(chunks, mask)  # (B*K, L, C), (B*K, P)
        return Condition(
            tokens=states.unflatten(0, (len(ids), -1)).flatten(1, 2),  # (B, K*L, C)
            mask=None if mask is None else mask.unflatten(0, (len(ids), -1)).flatten(1, 2),  # (B, K*L)
            pooled=pooled.unflatten(0, (len(ids), -1))[:, 0] if self.pooled else None,  # (B, P)
        )

    def attention_mask(self, ids: Tensor) -> Tensor:
        """True up to each row's first end token."""
        ends = (ids == self.require_tokenizer().end).int()  # (B, L)
        return ends.cumsum(1) - ends == 0  # (B, L)

    def read(self, batch: Mapping[str, Any]) -> Condition:
        ids = batch.get("ids", {}).get(self.part)
        return self.encode(self.tokenize(batch["caption"]) if ids is None else ids)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        if self.null_policy == "zeros":
            return self.zeros().repeat(count)
        return (self.cached_null() if self.frozen else self.encode(self.null_ids())).repeat(count)

    def null_ids(self) -> Tensor:
        """The ids of the empty text, (1, L); made once."""
        if self.empty is None:
            self.empty = self.tokenize([""])
        return self.empty

    def zeros(self) -> Condition:
        """Zeros in place of one text, all of which count."""
        weight, length = self.transformer.tokens.weight, self.chunks * self.length
        return Condition(
            tokens=weight.new_zeros(1, length, self.width),
            mask=torch.ones(1, length, dtype=torch.bool, device=weight.device) if self.masked else None,
            pooled=weight.new_zeros(1, self.pooled) if self.pooled else None,
        )

    def cached_null(self) -> Condition:
        """The empty text's states, encoded once per device and precision."""
        weight = self.transformer.tokens.weight
        kind = weight.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        key = (weight.device, weight.dtype, torch.get_autocast_dtype(kind) if mixed else None)
        if key not in self.null_cache:
            with torch.inference_mode(False), torch.no_grad():  # so that autograd can use them later
                self.null_cache[key] = self.encode(self.null_ids())
        return self.null_cache[key]

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.null_cache.clear()  # weights are moved or cast
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.null_cache.clear()
        super()._load_from_state_dict(*arguments)


def texts_in(module: nn.Module | None) -> list[Text]:
    """The text encoders in a module."""
    return [] if module is None else [m for m in module.modules() if isinstance(m, Text)]


def text_in(module: nn.Module | None) -> Text | None:
    """The first text encoder in a module."""
    return next(iter(texts_in(module)), None)


def tokenizer_owners(module: nn.Module | None) -> list[Text]:
    """The text encoders whose tokenizer a checkpoint stores; CLIP's is stored only if there is no other."""
    texts = texts_in(module)
    return [text for text in texts if not text.standard_tokenizer] or texts[:1]


def clip(
    *,
    width: int = 768,  # width of its states
    layers: int = 12,  # transformer blocks
    heads: int = 12,  # attention heads
    length: int = 77,  # tokens in a chunk, with its start and end
    vocabulary: int = 49408,  # size of the vocabulary
    projection: int | None = None,  # width of a pooled vector; null is none
    chunks: int = 1,  # chunks of a text that are read
    drop: float = 0.1,  # share of samples without their text
    null: Null = "empty",  # what replaces a dropped text: the states of the empty text, or zeros
    weights: str | None = None,  # a folder, a file, a Hub id or random; null uses the checkpoint's
) -> Text:
    """CLIP's text encoder as in Stable Diffusion 1: the last layer's states, unmasked, padded with end tokens.

    A chunk holds 75 tokens of text; `projection` adds a pooled vector.
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
    return frozen_text(transformer, weights, pad=None, chunks=chunks, drop=drop, null=null)


def open_clip(
    *,
    width: int = 1024,  # width of its states
    layers: int = 24,  # transformer blocks
    heads: int = 16,  # attention heads
    length: int = 77,  # tokens in a chunk, with its start and end
    vocabulary: int = 49408,  # size of the vocabulary
    chunks: int = 1,  # chunks of a text that are read
    drop: float = 0.1,  # share of samples without their text
    null: Null = "empty",  # what replaces a dropped text: the states of the empty text, or zeros
    weights: str | None = None,  # a folder, a file, a Hub id or random; null uses the checkpoint's
) -> Text:
    """OpenCLIP's text encoder as in Stable Diffusion 2: the penultimate layer, normalised, padded with 0.

    `layers` counts the published layers; the last one is not used and not built.
    """
    if layers < 2:
        raise ValueError(
            f"layers: too few, because the last layer is not used; got {layers}; expected 2 or more; try 24"
        )
    transformer = TextTransformer(
        vocabulary=vocabulary, length=length, width=width, layers=layers - 1, heads=heads, activation="gelu"
    )
    return frozen_text(transformer, weights, pad=0, chunks=chunks, drop=drop, null=null)


def frozen_text(transformer: TextTransformer, weights: str | None, pad: int | None, **options: Any) -> Text:
    """A published encoder with CLIP's tokenizer, frozen; a smaller vocabulary has a tokenizer of its own."""
    if pretrained.is_named(weights):
        pretrained.load_text(transformer, weights)
    standard = transformer.tokens.num_embeddings >= 49408
    text = Text(transformer, clip_tokenizer(pad) if standard else None, **options)
    text.standard_tokenizer = standard
    text.weights, text.needs_weights = weights if pretrained.is_named(weights) else None, weights is None
    text.freeze()
    return text


def joint_text(
    *,
    width: int = 256,  # width of its states
    layers: int = 6,  # transformer blocks
    heads: int = 4,  # attention heads
    head_width: int | None = None,  # width of each head; null divides the width among the heads
    length: int = 77,  # tokens of a text, with its start and end
    vocabulary: int = 2048,  # largest size of the learned vocabulary
    projection: int | None = None,  # width of a pooled vector; null is none
    masked: bool = True,  # mask the padding
    drop: float = 0.1,  # share of samples without their text
    null: Null = "empty",  # what replaces a dropped text: the states of the empty text, or zeros
    tokenizer: str | None = None,  # folder of a tokenizer; null trains one on the captions
    weights: str | None = None,  # first weights: a folder, a file, a Hub id or random
) -> Text:
    """LDM's text encoder, trained with the backbone: not causal, without bias in queries, keys and values.

    The tokenizer is trained on captions, or read from a folder. `projection` adds a pooled vector, with which a small
    model learns text faster. LDM's published text-to-image model has width 1280, 32 layers, 8 heads of width 64, the
    30522 ids of bert-base-uncased, and no mask.
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
    if pretrained.is_named(weights):
        pretrained.load_text(transformer, weights)
    known = None if tokenizer is None else from_folder(tokenizer)
    return Text(transformer, known, masked=masked, drop=drop, null=null)
