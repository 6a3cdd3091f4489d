"""Texts to rows of token ids, apart from encoding, so that a loader's workers can do it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.tokenizer import Tokenizer


class TruncatedText(UserWarning):
    """The end of a text was truncated."""

    def __init__(self, message: str, text: str):
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Tokenization:
    """A tokenizer with the length and the number of chunks that a text encoder reads."""

    tokenizer: Tokenizer
    length: int  # of a chunk, with its start and end
    chunks: int = 1

    @property
    def chunk_tokens(self) -> int:
        """The tokens of text in a chunk: all but its end, and its start if there is one."""
        return self.length - 1 - (self.tokenizer.start is not None)

    @property
    def max_tokens(self) -> int:
        """The tokens of text that are read, without starts and ends."""
        return self.chunks * self.chunk_tokens

    def truncates(self, text: str) -> bool:
        """True if the end of a text is truncated."""
        return len(self.tokenizer.encode(text)) > self.max_tokens

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The ids (B, chunks * length) of texts, on the CPU; truncation gives a warning."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"caption: not a list of texts; got {texts!r}; expected a list of str; try [caption]")
        return torch.tensor([self.row(text) for text in texts])

    def row(self, text: str) -> list[int]:
        """For each chunk the start, its part of the text, the end, and padding."""
        ids, limit, row = self.tokenizer.encode(text), self.max_tokens, []
        if len(ids) > limit:
            lost = self.tokenizer.decode(ids[limit:])
            message = f"text truncated to {limit} of {len(ids)} tokens; lost: {lost!r}"
            warnings.warn(TruncatedText(message, text), stacklevel=3)
        start = [] if self.tokenizer.start is None else [self.tokenizer.start]
        for number in range(self.chunks):
            part = ids[number * self.chunk_tokens : (number + 1) * self.chunk_tokens]
            chunk = [*start, *part, self.tokenizer.end]
            row += chunk + [self.tokenizer.pad] * (self.length - len(chunk))
        return row
