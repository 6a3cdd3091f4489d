"""What others call a text encoder's weights: transformers' CLIP, open_clip, and LDM's x-transformers encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoint.rename import refuse, rename, swap
from ldm.errors import CheckpointError
from ldm.models.transformer import ACTIVATIONS, TextTransformer

Layout = Literal["clip", "open_clip", "ldm"]
Pairs = list[tuple[str, str]]

ENDS = {
    "clip": {
        "tokens": "text_model.embeddings.token_embedding",
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection",
    },
    "open_clip": {"tokens": "token_embedding", "norm": "ln_final"},
    "ldm": {"tokens": "transformer.token_emb", "norm": "transformer.norm"},
}
POSITIONS = {
    "clip": "text_model.embeddings.position_embedding.weight",
    "open_clip": "positional_embedding",
    "ldm": "transformer.pos_emb.emb.weight",
}
BLOCK = {  # %d is the block; LDM counts attention and feed-forward layers in one list
    "clip": {
        "norm1": "text_model.encoder.layers.%d.layer_norm1",
        "attention.q": "text_model.encoder.layers.%d.self_attn.q_proj",
        "attention.k": "text_model.encoder.layers.%d.self_attn.k_proj",
        "attention.v": "text_model.encoder.layers.%d.self_attn.v_proj",
        "attention.out": "text_model.encoder.layers.%d.self_attn.out_proj",
        "norm2": "text_model.encoder.layers.%d.layer_norm2",
        "fc1": "text_model.encoder.layers.%d.mlp.fc1",
        "fc2": "text_model.encoder.layers.%d.mlp.fc2",
    },
    "open_clip": {
        "norm1": "transformer.resblocks.%d.ln_1",
        "attention.q": "transformer.resblocks.%d.attn.q",
        "attention.k": "transformer.resblocks.%d.attn.k",
        "attention.v": "transformer.resblocks.%d.attn.v",
        "attention.out": "transformer.resblocks.%d.attn.out_proj",
        "norm2": "transformer.resblocks.%d.ln_2",
        "fc1": "transformer.resblocks.%d.mlp.c_fc",
        "fc2": "transformer.resblocks.%d.mlp.c_proj",
    },
}
LDM_ATTENTION = {
    "norm1": "0",
    "attention.q": "1.to_q",
    "attention.k": "1.to_k",
    "attention.v": "1.to_v",
    "attention.out": "1.to_out",
}
LDM_FEED_FORWARD = {"norm2": "0", "fc1": "1.net.0.0", "fc2": "1.net.2"}
UNREAD = ("position_ids", "logit_scale", "attn_mask", "to_logits.weight", "to_logits.bias")  # no part of an encoder
MARKS: dict[str, Layout] = {  # the name in each layout that gives a tower away, at the end of whatever prefix
    "embeddings.token_embedding.weight": "clip",
    "transformer.token_emb.weight": "ldm",
    "token_embedding.weight": "open_clip",
}


def text_keys(transformer: TextTransformer, layout: Layout) -> Pairs:
    """The parameters of a text encoder beside their names in another layout, with q, k, v apart everywhere."""
    parameters = dict(transformer.named_parameters())
    biased = "blocks.0.attention.q.bias" in parameters
    if biased is (layout == "ldm"):
        got, expected = ("with bias", "without") if biased else ("without bias", "with")
        raise CheckpointError(f"no {layout} layout for this text encoder", got=f"queries {got}", expected=expected)
    modules = list(ENDS[layout].items())
    for number in range(len(transformer.blocks)):
        modules += [(f"blocks.{number}.{ours}", theirs) for ours, theirs in block_names(number, layout).items()]
    pairs = [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in modules for leaf in ("weight", "bias")]
    pairs = [("positions", POSITIONS[layout])] + [(ours, theirs) for ours, theirs in pairs if ours in parameters]
    if layout == "open_clip" and "projection.weight" in parameters:
        pairs.append(("projection.weight", "text_projection"))
    return pairs


def block_names(number: int, layout: Layout) -> dict[str, str]:
    """The modules of one block beside their names in another layout."""
    if layout != "ldm":
        return {ours: theirs % number for ours, theirs in BLOCK[layout].items()}
    layers = "transformer.attn_layers.layers"
    names = {ours: f"{layers}.{2 * number}.{theirs}" for ours, theirs in LDM_ATTENTION.items()}
    return names | {ours: f"{layers}.{2 * number + 1}.{theirs}" for ours, theirs in LDM_FEED_FORWARD.items()}


def find_text(state: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """The text encoder in a file of anybody's, found by its names: the layout, and the tensors without their prefix."""
    for mark, layout in MARKS.items():
        for name in state:
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark).removesuffix("text_model.")
                found = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
                return layout, {key: x for key, x in found.items() if is_text(key, layout)}
    names = list(state)[:5]
    raise CheckpointError("no text encoder inside", got=", ".join(names), expected="CLIP's, open_clip's or LDM's names")


def is_text(name: str, layout: Layout) -> bool:
    """Whether a name beside the text encoder's belongs to it, and not to CLIP's image half or to a larger file."""
    if layout == "clip":
        return name.startswith(("text_model.", "text_projection.", "embeddings.", "encoder.", "final_layer_norm."))
    ends = [*ENDS[layout].values(), POSITIONS[layout], "text_projection"]
    return name.startswith(("transformer.", *ends))


def read_text(state: Mapping[str, Tensor], transformer: TextTransformer, layout: Layout) -> dict[str, Tensor]:
    """Our weights from theirs; names that no encoder reads are passed over, any other must have its place."""
    theirs = drop_unread(state, transformer)
    if layout == "clip":
        theirs = {prefixed(name): x for name, x in theirs.items()}
    if layout == "open_clip":
        theirs = split_qkv(theirs, transformer)
    return rename(theirs, swap(text_keys(transformer, layout)))


def write_text(state: Mapping[str, Tensor], transformer: TextTransformer, layout: Layout) -> dict[str, Tensor]:
    """Their weights from ours; CLIP's always with the prefix `text_model.`, which every reader knows."""
    theirs = rename(state, text_keys(transformer, layout))
    return join_qkv(theirs, transformer) if layout == "open_clip" else theirs


def prefixed(name: str) -> str:
    """A CLIP name with the prefix that transformers' newer versions leave out."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def drop_unread(state: Mapping[str, Tensor], transformer: TextTransformer) -> dict[str, Tensor]:
    """A tower without what comes after the states that are read: SD 2 stops before the last block, and never pools."""
    unread = [f"transformer.resblocks.{len(transformer.blocks)}."]
    if transformer.blocks[0].activation is ACTIVATIONS["gelu"]:  # the same tower by transformers' names
        unread += [f"{prefix}encoder.layers.{len(transformer.blocks)}." for prefix in ("", "text_model.")]
    if not isinstance(transformer.projection, torch.nn.Linear):
        unread.append("text_projection")
    return {k: x for k, x in state.items() if not k.startswith(tuple(unread)) and not k.endswith(UNREAD)}


def split_qkv(state: dict[str, Tensor], transformer: TextTransformer) -> dict[str, Tensor]:
    """open_clip's weights with separate q, k, v and a projection that is a linear layer's."""
    state = dict(state)
    for number in range(len(transformer.blocks)):
        name = f"transformer.resblocks.{number}.attn"
        for leaf in ("weight", "bias"):
            refuse("tensors are missing", [key for key in [f"{name}.in_proj_{leaf}"] if key not in state])
            for letter, part in zip("qkv", state.pop(f"{name}.in_proj_{leaf}").chunk(3)):
                state[f"{name}.{letter}.{leaf}"] = part
    if "text_projection" in state:
        state["text_projection"] = state["text_projection"].T.contiguous()
    return state


def join_qkv(state: dict[str, Tensor], transformer: TextTransformer) -> dict[str, Tensor]:
    """The inverse of `split_qkv`."""
    state = dict(state)
    for number in range(len(transformer.blocks)):
        name = f"transformer.resblocks.{number}.attn"
        for leaf in ("weight", "bias"):
            state[f"{name}.in_proj_{leaf}"] = torch.cat([state.pop(f"{name}.{letter}.{leaf}") for letter in "qkv"])
    if "text_projection" in state:
        state["text_projection"] = state["text_projection"].T.contiguous()
    return state
