"""Constructor numbers read off the names and shapes of other people's weights, with plain arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.models.dit import SIZES

Shapes = Mapping[str, tuple[int, ...]]

# Patterns with a group count distinct numbers; {l} is a level, {i} a block in it, {n} a row of CompVis's flat list.
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
DITS: dict[str, dict[str, str]] = {
    "dit": {
        "first": "x_embedder.proj.weight",
        "last": "final_layer.linear.weight",
        "blocks": r"blocks\.(\d+)\.",
        "label": "y_embedder.embedding_table.weight",
    },
    "diffusers": {
        "first": "pos_embed.proj.weight",
        "last": "proj_out_2.weight",
        "blocks": r"transformer_blocks\.(\d+)\.",
        "label": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
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
    """How many different things the pattern's group finds at the beginnings of names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def beginning(shapes: Shapes, prefix: str) -> list[str]:
    """The names that begin so."""
    return [name for name in shapes if name.startswith(prefix)]


def unet_numbers(shapes: Shapes, layout: str) -> dict[str, Any]:
    """What a U-Net's names and shapes say of its constructor's arguments: all but its heads."""
    names = UNETS[layout]
    levels = 1 + count(shapes, names["ups"])
    blocks = count(shapes, names["rows"]) // levels - 1
    channels, total = shapes[names["first"]][:2]
    places = [{"l": level, "i": 0, "n": 1 + level * (blocks + 1)} for level in range(levels)]
    widths = [shapes[names["conv"].format(**place)][0] for place in places]
    attentions = [beginning(shapes, names["attend"].format(**place)) for place in places]
    middle = beginning(shapes, names["middle"])
    depths = [count(found, r".*transformer_blocks\.(\d+)\.") or 1 for found in [*attentions[:-1], middle]]
    projection = next((shapes[name] for name in middle if name.endswith("proj_in.weight")), (0, 0))
    numbers = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "attend": [2**level for level, found in enumerate(attentions) if found],
        "depth": depths[0] if len(set(depths)) == 1 else depths,
        "linear": middle_is_linear(projection),
        "scale_shift": shapes[names["embed"].format(**places[0])][0] == 2 * channels,
        "resample": "residual" if count(shapes, names["residual_ups"]) else "conv",
    }
    defaults = {"depth": 1, "linear": False, "scale_shift": False, "resample": "conv"}
    numbers = {name: number for name, number in numbers.items() if defaults.get(name) != number}
    out, context = shapes[names["last"]][0], [shapes[name][1] for name in middle if name.endswith("attn2.to_k.weight")]
    return numbers | {
        "given": given(
            total,
            out,
            context=context[0] if context else None,
            classes=shapes.get(names["label"], (None,))[0],
            pooled=shapes.get(names["pooled"], (0, None))[1],
        )
    }


def middle_is_linear(projection: tuple[int, ...]) -> bool:
    """Whether the projection around a transformer is a linear layer's, as in SD 2, or a convolution's."""
    return len(projection) == 2 and projection != (0, 0)


def given(total: int, out: int, **others: int | None) -> dict[str, Any]:
    """What a backbone is given by the assembly, from its first and last layers' channels."""
    learned = out == 2 * total
    latent = total if learned else out
    return {"in_channels": latent, "extra_channels": total - latent, "learned_sigma": learned, **others}


def dit_numbers(shapes: Shapes, layout: str) -> dict[str, Any]:
    """What a DiT's names and shapes say; its heads are the paper's, 64 wide but for the largest."""
    names = DITS[layout]
    width, total, patch, _ = shapes[names["first"]]
    paper = {size["width"]: size["heads"] for size in SIZES.values()}
    return {
        "width": width,
        "depth": count(shapes, names["blocks"]),
        "heads": paper.get(width, max(1, width // 64)),
        "patch": patch,
        "given": given(
            total,
            shapes[names["last"]][0] // patch**2,
            context=None,
            classes=shapes.get(names["label"], (None,))[0],
            pooled=None,
        ),
    }


def autoencoder_numbers(shapes: Shapes, layout: str) -> dict[str, Any]:
    """The configuration of an autoencoder, from its names and shapes."""
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
        "attend": [2**level for level in levels if beginning(shapes, names["attend"].format(l=level))],
        "mid_attention": bool(beginning(shapes, names["middle"])),
    }


def text_numbers(shapes: Shapes, layout: str) -> dict[str, Any]:
    """What a text encoder's names and shapes say: all but its heads, which are 64 wide where nobody says otherwise."""
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
        heads = shapes[names["query"]][0] // 64
        numbers |= {"heads": heads, "head_width": 64, "masked": False}
    return numbers
