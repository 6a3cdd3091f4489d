"""Hyperparameters of networks, inferred from the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Node = dict[str, Any]

CONTEXT = ("attn2.to_k.weight", "cross_attention.k.weight")  # read the tokens; in all layouts
# A pattern's group counts distinct numbers; {l} is a level, {i} a block in it, {n} a row of CompVis's flat list.
UNETS: dict[str, dict[str, str]] = {
    "compvis": {
        "first": "input_blocks.0.0.weight",
        "last": "out.2.weight",
        "rows": r"input_blocks\.(\d+)\.",
        "ups": r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.2)\.weight",
        "residual_ups": r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight",
        "conv": "input_blocks.{n}.0.out_layers.3.weight",
        "embed": "input_blocks.{n}.0.emb_layers.1.weight",
        "attend": "input_blocks.{n}.1.",
        "middle": "middle_block.1.",
        "label": "label_emb.weight",
        "pooled": "label_emb.0.0.weight",
    },
    "diffusers": {
        "first": "conv_in.weight",
        "last": "conv_out.weight",
        "rows": r"(down_blocks\.\d+\.(?:resnets|downsamplers)\.\d+|conv_in)\.",
        "ups": r"up_blocks\.(\d+)\.upsamplers\.0\.(?:conv|conv1)\.weight",
        "residual_ups": r"up_blocks\.(\d+)\.upsamplers\.0\.conv1\.weight",
        "conv": "down_blocks.{l}.resnets.{i}.conv2.weight",
        "embed": "down_blocks.{l}.resnets.{i}.time_emb_proj.weight",
        "attend": "down_blocks.{l}.attentions.{i}.",
        "middle": "mid_block.attentions.0.",
        "label": "class_embedding.weight",
        "pooled": "class_embedding.linear_1.weight",
    },
    "ours": {
        "first": "encoder.0.main.weight",
        "last": "out.weight",
        "label": "time.label.weight",
        "pooled": "time.pooled.0.weight",
    },
}
AUTOENCODERS: dict[str, dict[str, str]] = {
    "compvis": {
        "levels": r"encoder\.down\.(\d+)\.",
        "blocks": r"encoder\.down\.0\.block\.(\d+)\.",
        "conv": "encoder.down.{l}.block.0.conv1.weight",
        "attend": "encoder.down.{l}.attn.",
        "middle": "encoder.mid.attn_1.",
    },
    "diffusers": {
        "levels": r"encoder\.down_blocks\.(\d+)\.",
        "blocks": r"encoder\.down_blocks\.0\.resnets\.(\d+)\.",
        "conv": "encoder.down_blocks.{l}.resnets.0.conv1.weight",
        "attend": "encoder.down_blocks.{l}.attentions.",
        "middle": "encoder.mid_block.attentions.0.",
    },
}
TEXTS: dict[str, dict[str, str]] = {
    "clip": {
        "tokens": "embeddings.token_embedding.weight",
        "positions": "embeddings.position_embedding.weight",
        "blocks": r"encoder\.layers\.(\d+)\.",
    },
    "open_clip": {
        "tokens": "token_embedding.weight",
        "positions": "positional_embedding",
        "blocks": r"transformer\.resblocks\.(\d+)\.",
    },
    "ldm": {
        "tokens": "transformer.token_emb.weight",
        "positions": "transformer.pos_emb.emb.weight",
        "blocks": r"transformer\.attn_layers\.layers\.(\d+)\.1\.to_q\.",
        "query": "transformer.attn_layers.layers.0.1.to_q.weight",
    },
}


def count(names: Iterable[str], pattern: str) -> int:
    """The number of distinct groups that the pattern matches at the beginnings of names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def beginning_with(shapes: Shapes, prefix: str) -> list[str]:
    """The names that begin with a prefix."""
    return [name for name in shapes if name.startswith(prefix)]


def unet_numbers(shapes: Shapes, layout: str) -> Node:
    """A U-Net's constructor arguments but its heads, which no shape tells."""
    names = UNETS[layout]
    levels = 1 + count(shapes, names["ups"])
    blocks = count(shapes, names["rows"]) // levels - 1
    channels = shapes[names["first"]][0]
    firsts = [{"l": level, "i": 0, "n": 1 + level * (blocks + 1)} for level in range(levels)]
    widths = [shapes[names["conv"].format(**first)][0] for first in firsts]
    attentions = [beginning_with(shapes, names["attend"].format(**first)) for first in firsts]
    middle = beginning_with(shapes, names["middle"])
    depths = [count(found, r".*transformer_blocks\.(\d+)\.") or 1 for found in [*attentions[:-1], middle]]
    projections = [shapes[name] for name in middle if name.endswith("proj_in.weight")]
    numbers = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "attend": [2**level for level, found in enumerate(attentions) if found],
        "depth": depths[0] if len(set(depths)) == 1 else depths,
        "linear": any(len(projection) == 2 for projection in projections),  # as in Stable Diffusion 2
        "scale_shift": shapes[names["embed"].format(**firsts[0])][0] == 2 * channels,
        "resample": "residual" if count(shapes, names["residual_ups"]) else "conv",
    }
    defaults = {"depth": 1, "linear": False, "scale_shift": False, "resample": "conv"}
    return {name: number for name, number in numbers.items() if defaults.get(name) != number}


def unet_given(shapes: Shapes, layout: str) -> Node:
    """What the assembly gives a U-Net."""
    names = UNETS[layout]
    return given(shapes, names["first"], names["last"], names["label"], names["pooled"])


def given(shapes: Shapes, first: str, last: str, label: str, pooled: str = "", patch: int = 1) -> Node:
    """What the assembly gives a backbone, from the names of its first and last layer and of its embeddings."""
    total, out = shapes[first][1], shapes[last][0] // patch**2
    learned = out == 2 * total
    latent = total if learned else out
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith(CONTEXT)]
    return {
        "in_channels": latent,
        "extra_channels": total - latent,
        "learned_sigma": learned,
        "context": contexts[0] if contexts else None,
        "classes": shapes.get(label, (None,))[0],
        "pooled": shapes.get(pooled, (0, None))[1],
    }


def autoencoder_numbers(shapes: Shapes, layout: str) -> Node:
    """An autoencoder's node in a configuration."""
    names = AUTOENCODERS[layout]
    levels = range(count(shapes, names["levels"]))
    channels = shapes["encoder.conv_in.weight"][0]
    codes = shapes.get("quantize.embedding.weight")
    return {
        "type": "vq" if codes else "kl",
        "latent": shapes["post_quant_conv.weight"][1],
        **({"codes": codes[0]} if codes else {}),
        "channels": channels,
        "multipliers": [shapes[names["conv"].format(l=level)][0] // channels for level in levels],
        "blocks": count(shapes, names["blocks"]),
        "attend": [2**level for level in levels if beginning_with(shapes, names["attend"].format(l=level))],
        "mid_attention": bool(beginning_with(shapes, names["middle"])),
    }


def text_numbers(shapes: Shapes, layout: str) -> Node:
    """A text encoder's arguments; where the layout does not fix them, heads are 64 wide."""
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    names = TEXTS[layout]
    vocabulary, width = shapes[names["tokens"]]
    numbers = {
        "width": width,
        "layers": count(shapes, names["blocks"]),
        "heads": max(1, width // 64),
        "length": shapes[names["positions"]][0],
        "vocabulary": vocabulary,
    }
    if layout == "ldm":  # heads of 64 whatever the width, and no mask
        numbers |= {"heads": shapes[names["query"]][0] // 64, "head_width": 64, "masked": False}
    return numbers
