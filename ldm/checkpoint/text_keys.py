"""What others call a text encoder's weights: transformers' CLIP, open_clip, and LDM's x-transformers encoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ldm.checkpoint.rename import Joint, KeyMap, Pairs, State, columns, expand, under
from ldm.errors import CheckpointError
from ldm.models.transformer import ACTIVATIONS, TextTransformer

ENDS = columns("""
    ours        clip                                   open_clip        ldm
    tokens      text_model.embeddings.token_embedding  token_embedding  transformer.token_emb
    norm        text_model.final_layer_norm            ln_final         transformer.norm
    projection  text_projection                        -                -
""")
POSITIONS = {
    "clip": "text_model.embeddings.position_embedding.weight",
    "open_clip": "positional_embedding",
    "ldm": "transformer.pos_emb.emb.weight",
}
BLOCK = columns("""
    ours           clip                open_clip      ldm
    norm1          layer_norm1         ln_1           0
    attention.q    self_attn.q_proj    attn.q         1.to_q
    attention.k    self_attn.k_proj    attn.k         1.to_k
    attention.v    self_attn.v_proj    attn.v         1.to_v
    attention.out  self_attn.out_proj  attn.out_proj  1.to_out
    norm2          layer_norm2         ln_2           0
    fc1            mlp.fc1             mlp.c_fc       1.net.0.0
    fc2            mlp.fc2             mlp.c_proj     1.net.2
""")
BLOCKS = {"clip": "text_model.encoder.layers", "open_clip": "transformer.resblocks"}
UNREAD = ("position_ids", "logit_scale", "attn_mask", "to_logits.weight", "to_logits.bias")  # no part of an encoder
MARKS = {  # the name that identifies each layout, after any prefix
    "embeddings.token_embedding.weight": "clip",
    "transformer.token_emb.weight": "ldm",
    "token_embedding.weight": "open_clip",
}


def text_keys(transformer: TextTransformer, layout: str) -> KeyMap:
    """A text encoder's parameters beside their names in another layout."""
    parameters = dict(transformer.named_parameters())
    biased = "blocks.0.attention.q.bias" in parameters
    if biased is (layout == "ldm"):
        got, expected = ("with bias", "without") if biased else ("without bias", "with")
        raise CheckpointError(f"no {layout} layout for this text encoder", got=f"queries {got}", expected=expected)
    modules = list(ENDS[layout].items())
    for number in range(len(transformer.blocks)):
        modules += [(f"blocks.{number}.{ours}", theirs) for ours, theirs in block_names(number, layout)]
    pairs = [("positions", POSITIONS[layout]), *expand(transformer, modules)]
    if layout != "open_clip":
        return KeyMap(pairs)
    pairs += [("projection.weight", "text_projection")] if "projection.weight" in parameters else []
    attentions = [f"{BLOCKS[layout]}.{number}.attn" for number in range(len(transformer.blocks))]
    leaves = ("weight", "bias")
    joints = [
        Joint(f"{name}.in_proj_{leaf}", [f"{name}.{x}.{leaf}" for x in "qkv"]) for name in attentions for leaf in leaves
    ]
    return KeyMap(pairs, joints, transposed=("text_projection",))


def block_names(number: int, layout: str) -> Pairs:
    """The modules of one block in both layouts; LDM counts attention and feed-forward layers in one list."""
    if layout != "ldm":
        return [(ours, f"{BLOCKS[layout]}.{number}.{theirs}") for ours, theirs in BLOCK[layout].items()]
    layers, feed_forward = "transformer.attn_layers.layers", ("norm2", "fc1", "fc2")
    places = [(ours, 2 * number + (ours in feed_forward), theirs) for ours, theirs in BLOCK[layout].items()]
    return [(ours, f"{layers}.{place}.{theirs}") for ours, place, theirs in places]


def find_text(state: Mapping[str, Tensor]) -> tuple[str, State]:
    """The text encoder in any file, found by its names: the layout, and the tensors without their prefix."""
    for mark, layout in MARKS.items():
        for name in state:
            if name == mark or name.endswith(f".{mark}"):
                found = under(state, name.removesuffix(mark).removesuffix("text_model."))
                return layout, {key: x for key, x in found.items() if is_text(key, layout)}
    names = list(state)[:5]
    raise CheckpointError("no text encoder inside", got=", ".join(names), expected="CLIP's, open_clip's or LDM's names")


def is_text(name: str, layout: str) -> bool:
    """True for a text encoder's tensor, false for those of CLIP's image encoder or of a larger file."""
    if layout == "clip":
        return name.startswith(("text_model.", "text_projection.", "embeddings.", "encoder.", "final_layer_norm."))
    ends = [*ENDS[layout].values(), POSITIONS[layout], "text_projection"]
    return name.startswith(("transformer.", *ends))


def read_text(state: Mapping[str, Tensor], transformer: TextTransformer, layout: str) -> State:
    """Our tensors from theirs; names that no encoder reads are skipped, every other must have its place."""
    theirs = drop_unread(state, transformer)
    if layout == "clip":  # newer versions of transformers leave the prefix out
        whole = ("text_model.", "text_projection.")
        theirs = {name if name.startswith(whole) else f"text_model.{name}": x for name, x in theirs.items()}
    return text_keys(transformer, layout).read(theirs, transformer)


def write_text(state: Mapping[str, Tensor], transformer: TextTransformer, layout: str) -> State:
    """Their tensors from ours; CLIP's always with the prefix `text_model.`, which every reader knows."""
    return text_keys(transformer, layout).write(state)


def drop_unread(state: Mapping[str, Tensor], transformer: TextTransformer) -> State:
    """The tensors up to the states that are read: Stable Diffusion 2 stops before the last block and never pools."""
    unread = [f"transformer.resblocks.{len(transformer.blocks)}."]
    if transformer.blocks[0].activation is ACTIVATIONS["gelu"]:  # the same encoder under transformers' names
        unread += [f"{prefix}encoder.layers.{len(transformer.blocks)}." for prefix in ("", "text_model.")]
    if not isinstance(transformer.projection, nn.Linear):
        unread.append("text_projection")
    return {k: x for k, x in state.items() if not k.startswith(tuple(unread)) and not k.endswith(UNREAD)}
