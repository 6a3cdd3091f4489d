"""What other programs call a U-Net's weights: pairs of names, made from its own plan."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.checkpoint.rename import Joint, KeyMap, Pairs, columns, expand
from ldm.errors import CheckpointError
from ldm.models.transformer import AttentionPool
from ldm.models.unet import Row, UNet

RESIDUAL_BLOCK = columns("""
    ours   compvis          diffusers
    norm1  in_layers.0      norm1
    conv1  in_layers.2      conv1
    embed  emb_layers.1     time_emb_proj
    norm2  out_layers.0     norm2
    conv2  out_layers.3     conv2
    skip   skip_connection  conv_shortcut
""")
RESAMPLING = {"compvis": {"down": "op", "up": "conv"}, "diffusers": {"down": "conv", "up": "conv"}}
SPATIAL_TRANSFORMER = ("norm", "proj_in", "proj_out")  # in both layouts
TRANSFORMER_BLOCK = columns("""
    ours               theirs
    norm1              norm1
    self_attention     attn1
    norm2              norm2
    cross_attention    attn2
    norm3              norm3
    feed_forward.proj  ff.net.0.proj
    feed_forward.out   ff.net.2
""")["theirs"]
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
ENDS = columns("""
    ours           compvis        diffusers
    time.time.0    time_embed.0   time_embedding.linear_1
    time.time.2    time_embed.2   time_embedding.linear_2
    time.label     label_emb      class_embedding
    time.pooled.0  label_emb.0.0  class_embedding.linear_1
    time.pooled.2  label_emb.0.2  class_embedding.linear_2
    out_norm       out.0          conv_norm_out
    out            out.2          conv_out
""")


def unet_keys(unet: UNet, layout: str) -> KeyMap:
    """Names in a CompVis file, or of diffusers' UNet2DConditionModel or, for ADM's attention, UNet2DModel."""
    if layout == "diffusers" and not len(unet.decoder):
        what = "no diffusers layout for a noisy classifier"
        raise CheckpointError(what, got=layout, expected="compvis", hint="compvis")
    modules, fused = list(ENDS[layout].items()), []
    for row, main, attend in {"compvis": compvis_names, "diffusers": diffusers_names}[layout](unet.plan):
        modules += main_modules(unet, row, main, layout) + attention_modules(unet, row, attend, layout)
        if layout == "compvis" and row.attend and unet.context is None:
            fused.append((attend, "qkv", "proj_out", unet.heads_of(row.out_channels)))
    if not isinstance(unet.out, AttentionPool):
        return fuse(KeyMap(expand(unet, modules)), fused)
    modules += [(f"out.{a}", f"out.2.{b}") for a, b in (ATTENTION | {"out": "c_proj"}).items()]
    pairs = [*expand(unet, modules), ("out.positions", "out.2.positional_embedding")]
    pool = ("out.2", "qkv_proj", "c_proj", 1)  # not interleaved, as if it had one head
    return fuse(KeyMap(pairs, transposed=("out.2.positional_embedding",)), [*fused, pool])


def fuse(keys: KeyMap, attentions: list[tuple[str, str, str, int]]) -> KeyMap:
    """ADM keeps q, k, v of an attention in one convolution of width 1, interleaved head by head."""
    for name, joint, out, heads in attentions:
        for leaf in ("weight", "bias"):
            keys.joints.append(Joint(f"{name}.{joint}.{leaf}", [f"{name}.to_{x}.{leaf}" for x in "qkv"], heads))
        keys.convolutions |= {f"{name}.{joint}.weight": 3, f"{name}.{out}.weight": 3}
    return keys


def compvis_names(plan: list[Row]) -> Iterator[tuple[Row, str, str]]:
    """Each row with CompVis's names of its main module and its attention: flat lists of numbered blocks."""
    block, position = -1, 0
    for row in plan:
        part, number = row.name.split(".")
        if part == "encoder":
            yield row, f"input_blocks.{number}.0", f"input_blocks.{number}.1"
        elif part == "middle":
            yield row, f"middle_block.{0 if number == '0' else 2}", "middle_block.1"
        elif row.kind == "res":
            block, position = block + 1, 2 if row.attend else 1
            yield row, f"output_blocks.{block}.0", f"output_blocks.{block}.1"
        else:  # upsampling shares a block with the row before it
            yield row, f"output_blocks.{block}.{position}", ""


def diffusers_names(plan: list[Row]) -> Iterator[tuple[Row, str, str]]:
    """Each row with diffusers' names of its main module and its attention: a block per level, then an index."""
    level, index = {"encoder": 0, "decoder": 0}, 0
    for row in plan:
        part, number = row.name.split(".")
        if row.kind == "conv":
            yield row, "conv_in", ""
        elif part == "middle":
            yield row, f"mid_block.resnets.{number}", f"mid_block.attentions.{number}"
            index = 0
        else:
            block = f"{'down' if part == 'encoder' else 'up'}_blocks.{level[part]}"
            if row.kind == "res":
                yield row, f"{block}.resnets.{index}", f"{block}.attentions.{index}"
                index += 1
            else:
                yield row, f"{block}.{row.kind}samplers.0", ""
                level[part], index = level[part] + 1, 0


def main_modules(unet: UNet, row: Row, theirs: str, layout: str) -> Pairs:
    """The modules of a row's convolution, residual block or resampling."""
    if row.kind == "conv":
        return [(f"{row.name}.main", theirs)]
    if row.kind != "res" and unet.resample == "conv":
        return [(f"{row.name}.main.conv", f"{theirs}.{RESAMPLING[layout][row.kind]}")]
    return [(f"{row.name}.main.{a}", f"{theirs}.{b}") for a, b in RESIDUAL_BLOCK[layout].items()]


def attention_modules(unet: UNet, row: Row, theirs: str, layout: str) -> Pairs:
    """The modules of the attention after a row: ADM's, or LDM's transformer blocks."""
    if not row.attend:
        return []
    ours = f"{row.name}.attend"
    if unet.context is None:
        names = {"norm": "norm" if layout == "compvis" else "group_norm"}
        names |= {f"attention.{a}": b for a, b in ATTENTION.items()}
        names |= {"attention.out": "proj_out"} if layout == "compvis" else {}
        return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in names.items()]
    pairs = [(f"{ours}.{name}", f"{theirs}.{name}") for name in SPATIAL_TRANSFORMER]
    for number in range(row.attend):
        for a, b in TRANSFORMER_BLOCK.items():
            block = (f"{ours}.blocks.{number}.{a}", f"{theirs}.transformer_blocks.{number}.{b}")
            inside = ATTENTION.items() if a.endswith("attention") else ()
            pairs += [(f"{block[0]}.{c}", f"{block[1]}.{d}") for c, d in inside] or [block]
    return pairs
