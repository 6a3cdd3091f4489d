"""T5's encoder (Raffel et al., 2020) as a condition, with transformers' implementation."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.hub import on_hub
from ldm.checkpoint.rename import refuse
from ldm.conditioning import pretrained
from ldm.conditioning.text import Null, Text
from ldm.conditioning.tokenizer import from_folder
from ldm.models.layers import check_positive


class T5Tower(nn.Module):
    """transformers' T5 encoder with the interface of a TextTransformer."""

    projection = None

    def __init__(self, encoder: nn.Module, length: int):
        super().__init__()
        self.encoder, self.length = encoder, length

    @property
    def tokens(self) -> nn.Embedding:
        """The token embeddings."""
        return self.encoder.embed_tokens  # type: ignore[return-value]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kind = ids.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        overflows = mixed and torch.get_autocast_dtype(kind) == torch.float16  # v1.1's states overflow float16
        with torch.autocast(kind, enabled=False) if overflows else nullcontext():
            states = self.encoder(ids, attention_mask=mask).last_hidden_state  # (B, L, C)
        return states, states[:, 0]  # (B, L, C), (B, C); T5 has no pooled vector, and the second is not used


def t5(
    *,
    width: int = 4096,  # width of its states
    layers: int = 24,  # transformer blocks
    heads: int = 64,  # attention heads
    head_width: int = 64,  # width of each head
    hidden: int = 10240,  # width of the feed-forward layers
    gated: bool = True,  # gated feed-forward layers, as in v1.1
    vocabulary: int = 32128,  # size of the vocabulary
    length: int = 120,  # tokens of a text that are read
    drop: float = 0.1,  # share of samples without their text
    null: Null = "empty",  # what replaces a dropped text: the states of the empty text, or zeros
    weights: str | None = None,  # a folder, a Hub id or random; null uses the checkpoint's
) -> Text:
    """Captions through a frozen T5 encoder, masked after the end; the defaults are T5 v1.1 XXL's.

    A folder or Hub id in `weights` also has the tokenizer, and its model must have the numbers given here.
    """
    from transformers import T5Config, T5EncoderModel

    check_positive(width=width, layers=layers, heads=heads, head_width=head_width, hidden=hidden, length=length)
    numbers: dict[str, Any] = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": head_width}
    numbers |= {"d_ff": hidden, "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu" if gated else "relu"}
    tokenizer = None
    if pretrained.is_named(weights):
        folder = find_folder(weights)
        model, tokenizer = load(folder, numbers), from_folder(folder)
    else:
        model = T5EncoderModel(T5Config(**numbers))
    text = Text(T5Tower(model.encoder, length), tokenizer, masked=True, drop=drop, null=null)
    text.weights, text.needs_weights = weights if pretrained.is_named(weights) else None, weights is None
    text.freeze()
    return text


def find_folder(weights: str) -> str:
    """The folder itself, or the local folder of a model on the Hub."""
    if not Path(weights).is_dir() and not on_hub(weights):
        raise ValueError(f"weights: no such folder; got {weights}; expected a folder, a Hub id or random; try random")
    return weights if Path(weights).is_dir() else str(pretrained.download(weights, model_files))


def model_files(names: list[str]) -> list[str]:
    """The files that transformers opens; some T5 repositories have only pickles, which it reads as plain weights."""
    weights = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    weights = weights or [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    return weights and [name for name in names if "/" not in name and name.endswith((".json", ".model"))] + weights


def load(folder: str, numbers: dict[str, Any]) -> Any:
    """transformers' T5 from a folder; refuses one with other numbers or missing weights."""
    from transformers import AutoConfig, T5EncoderModel

    config = from_pretrained(AutoConfig, folder)
    for name, value in numbers.items():
        if getattr(config, name, None) != value:
            got, expected = getattr(config, name, None), f"{value}, as configured"
            raise ValueError(f"weights: another T5; got {name} = {got} in {folder}; expected {expected}")
    model, report = from_pretrained(T5EncoderModel, folder, output_loading_info=True)
    refuse("missing tensors", sorted(report["missing_keys"]))
    return model.float()  # transformers keeps the type of the file


def from_pretrained(kind: Any, folder: str, **options: Any) -> Any:
    """An object of transformers from a folder."""
    try:
        with torch.device("cpu"):  # under torch.device("meta"), transformers would read nothing
            return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights: cannot be read; got {folder}: {reason}; expected a T5; try a folder") from error
