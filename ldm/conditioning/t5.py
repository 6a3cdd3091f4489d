"""T5's encoder (Raffel et al., 2020) as a condition; the encoder is transformers' own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.hub import on_hub
from ldm.checkpoint.rename import refuse
from ldm.conditioning import pretrained as stored
from ldm.conditioning.text import Text
from ldm.conditioning.tokenizer import from_folder
from ldm.models.layers import check_positive


class T5Tower(nn.Module):
    """transformers' T5 encoder with the face of a TextTransformer."""

    projection = None

    def __init__(self, encoder: nn.Module, length: int):
        super().__init__()
        self.encoder, self.length = encoder, length

    @property
    def tokens(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.encoder.embed_tokens  # type: ignore[return-value]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kind = ids.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        overflows = mixed and torch.get_autocast_dtype(kind) == torch.float16  # v1.1's states are too large for it
        with torch.autocast(kind, enabled=False) if overflows else nullcontext():
            states = self.encoder(ids, attention_mask=mask).last_hidden_state  # (B, L, C)
        return states, states[:, 0]  # (B, L, C), (B, C): T5 has no pooled vector, and nobody asks for it


def t5(
    *,
    width: int = 4096,  # of its states
    layers: int = 24,  # blocks of attention
    heads: int = 64,  # of attention
    head_width: int = 64,  # of each of them
    hidden: int = 10240,  # of the blocks' two-layer networks
    gated: bool = True,  # those of v1.1
    vocabulary: int = 32128,  # tokens that it knows
    length: int = 120,  # tokens that are read of a text
    drop: float = 0.1,  # share of samples that lose their text
    weights: str | None = None,  # a folder, a hub's id or random; without it, those of the checkpoint
) -> Text:
    """Captions through a frozen T5 encoder, masked after the end; the defaults are T5 v1.1 XXL's, `gated` v1.1's kind.

    With `weights` (a folder or a hub's id) the tokenizer comes from there, and the numbers must be that model's.
    """
    from transformers import T5Config, T5EncoderModel

    check_positive(width=width, layers=layers, heads=heads, head_width=head_width, hidden=hidden, length=length)
    numbers: dict[str, Any] = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": head_width}
    numbers |= {"d_ff": hidden, "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu" if gated else "relu"}
    tokenizer = None
    if named := stored.given(weights):
        folder = place(str(weights))
        model, tokenizer = load(folder, numbers), from_folder(folder)
    else:
        model = T5EncoderModel(T5Config(**numbers))
    text = Text(T5Tower(model.encoder, length), tokenizer, masked=True, drop=drop)
    text.weights, text.unfilled = weights if named else None, weights is None
    text.freeze()
    return text


def place(weights: str) -> str:
    """The folder itself, or that of a model on a hub."""
    if not Path(weights).is_dir() and not on_hub(weights):
        raise ValueError(f"weights: no such folder; got {weights}; expected a folder, a hub's id or random; try random")
    return weights if Path(weights).is_dir() else str(stored.hub_folder(weights, model_files))


def model_files(names: list[str]) -> list[str]:
    """Of a repository what transformers opens; some of T5's have pickles alone, which it reads as plain weights."""
    weights = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    weights = weights or [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    return weights and [name for name in names if "/" not in name and name.endswith((".json", ".model"))] + weights


def load(folder: str, numbers: dict[str, Any]) -> Any:
    """transformers' T5 from a folder, if it has the numbers that were asked for, and every weight."""
    from transformers import AutoConfig, T5EncoderModel

    config = pretrained(AutoConfig, folder)
    for name, value in numbers.items():
        if getattr(config, name, None) != value:
            got, expected = getattr(config, name, None), f"{value}, as configured"
            raise ValueError(f"weights: another T5; got {name} = {got} in {folder}; expected {expected}")
    model, report = pretrained(T5EncoderModel, folder, output_loading_info=True)
    refuse("tensors are missing", sorted(report["missing_keys"]))
    return model.float()  # transformers leaves it as the file has it


def pretrained(kind: Any, folder: str, **options: Any) -> Any:
    """Something of transformers from a folder."""
    try:
        with torch.device("cpu"):  # transformers reads nothing where networks are made without memory
            return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights: cannot be read; got {folder}: {reason}; expected a T5; try a folder") from error
