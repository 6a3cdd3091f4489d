"""Hyperparameters of networks, inferred from the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoint.rename import columns

Shapes = Mapping[str, tuple[int, ...]]
Node = dict[str, Any]

CONTEXT = ("attn2.to_k.weight", "cross_attention.k.weight")  # read the tokens; in all layouts
LDM_QUERY = "transformer.attn_layers.layers.0.1.to_q.weight"
# `#` counts distinct numbers; {l} is a level, {i} a block in it, {n} a row of CompVis's flat list
UNETS = columns(r"""
    what          compvis                                            diffusers
    first         input_blocks.0.0.weight                            conv_in.weight
    last          out.2.weight                                       conv_out.weight
    rows          input_blocks.#.                                    (down_blocks.\d+.(?:res|downs)\w+.\d+|conv_in).
    ups           output_blocks.#.[12].(?:conv|in_layers.2).weight   up_blocks.#.upsamplers.0.conv1?.weight
    residual_ups  output_blocks.#.[12].in_layers.2.weight            up_blocks.#.upsamplers.0.conv1.weight
    conv          input_blocks.{n}.0.out_layers.3.weight             down_blocks.{l}.resnets.{i}.conv2.weight
    embed         input_blocks.{n}.0.emb_layers.1.weight             down_blocks.{l}.resnets.{i}.time_emb_proj.weight
    attend        input_blocks.{n}.1.                                down_blocks.{l}.attentions.{i}.
    middle        middle_block.1.                                    mid_block.attentions.0.
    label         label_emb.weight                                   class_embedding.weight
    pooled        label_emb.0.0.weight                               class_embedding.linear_1.weight
""")
UNETS["ours"] = {"first": "encoder.0.main.weight", "last": "out.weight"}
UNETS["ours"] |= {"label": "time.label.weight", "pooled": "time.pooled.0.weight"}
AUTOENCODERS = columns("""
    what    compvis                                diffusers
    levels  encoder.down.#.                        encoder.down_blocks.#.
    blocks  encoder.down.0.block.#.                encoder.down_blocks.0.resnets.#.
    conv    encoder.down.{l}.block.0.conv1.weight  encoder.down_blocks.{l}.resnets.0.conv1.weight
    attend  encoder.down.{l}.attn.                 encoder.down_blocks.{l}.attentions.
    middle  encoder.mid.attn_1.                    encoder.mid_block.attentions.0.
""")
TEXTS = columns("""
    layout     tokens                             positions                             blocks
    clip       embeddings.token_embedding.weight  embeddings.position_embedding.weight  encoder.layers.#.
    open_clip  token_embedding.weight             positional_embedding                  transformer.resblocks.#.
    ldm        transformer.token_emb.weight       transformer.pos_emb.emb.weight        .*layers.#.1.to_q
""")


def count(names: Iterable[str], pattern: str) -> int:
    """The number of distinct groups, `#` or in parentheses, that the pattern matches at the beginnings of names."""
    find = re.compile(pattern.replace(".", r"\.").replace(r"\.*", ".*").replace("#", r"(\d+)")).match
    return len({match[1] for match in map(find, names) if match})


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
    depths = [count(found, ".*transformer_blocks.#.") or 1 for found in [*attentions[:-1], middle]]
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
    vocabulary, width = shapes[TEXTS["tokens"][layout]]
    numbers = {
        "width": width,
        "layers": count(shapes, TEXTS["blocks"][layout]),
        "heads": max(1, width // 64),
        "length": shapes[TEXTS["positions"][layout]][0],
        "vocabulary": vocabulary,
    }
    if layout == "ldm":  # heads of 64 whatever the width, and no mask
        numbers |= {"heads": shapes[LDM_QUERY][0] // 64, "head_width": 64, "masked": False}
    return numbers
