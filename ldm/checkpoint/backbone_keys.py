"""What others call a backbone's weights: pairs of names (ours, theirs), made from its own plan, for `rename`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoint.rename import refuse, rename, swap
from ldm.errors import CheckpointError
from ldm.models.dit import DiT
from ldm.models.transformer import AttentionPool
from ldm.models.unet import Row, UNet

Layout = Literal["compvis", "diffusers", "dit"]  # dit: the names of DiT's own repository
Pairs = list[tuple[str, str]]

RESIDUAL_BLOCK = {
    "compvis": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    "diffusers": {
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
}
RESAMPLING = {"compvis": {"down": "op", "up": "conv"}, "diffusers": {"down": "conv", "up": "conv"}}
SPATIAL_TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}  # in both layouts
TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "self_attention": "attn1",
    "norm2": "norm2",
    "cross_attention": "attn2",
    "norm3": "norm3",
    "feed_forward.proj": "ff.net.0.proj",
    "feed_forward.out": "ff.net.2",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
UNET_ENDS = {
    "compvis": {
        "time.time.0": "time_embed.0",
        "time.time.2": "time_embed.2",
        "time.label": "label_emb",
        "time.pooled.0": "label_emb.0.0",
        "time.pooled.2": "label_emb.0.2",
        "out_norm": "out.0",
        "out": "out.2",
    },
    "diffusers": {
        "time.time.0": "time_embedding.linear_1",
        "time.time.2": "time_embedding.linear_2",
        "time.label": "class_embedding",
        "time.pooled.0": "class_embedding.linear_1",
        "time.pooled.2": "class_embedding.linear_2",
        "out_norm": "conv_norm_out",
        "out": "conv_out",
    },
}
DIT_ENDS = {
    "dit": {
        "embed": "x_embedder.proj",
        "time.time.0": "t_embedder.mlp.0",
        "time.time.2": "t_embedder.mlp.2",
        "time.label": "y_embedder.embedding_table",
        "modulation": "final_layer.adaLN_modulation.1",
        "out": "final_layer.linear",
    },
    "diffusers": {"embed": "pos_embed.proj", "modulation": "proj_out_1", "out": "proj_out_2"},
}
DIT_BLOCK = {
    "dit": {"modulation": "adaLN_modulation.1", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    "diffusers": {"modulation": "norm1.linear", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"},
}
DIT_ATTENTION = {  # DiT's q, k, v are one matrix in its files: `split_dit`
    "dit": {"q": "attn.q", "k": "attn.k", "v": "attn.v", "out": "attn.proj"},
    "diffusers": {name: f"attn1.{theirs}" for name, theirs in ATTENTION.items()},
}
DIT_EMBEDDER = {  # one of ours, one per block of theirs
    "time.time.0": "timestep_embedder.linear_1",
    "time.time.2": "timestep_embedder.linear_2",
    "time.label": "class_embedder.embedding_table",
}


def write_backbone(state: dict[str, Tensor], backbone: UNet | DiT, layout: Layout) -> dict[str, Tensor]:
    """Our weights under the names, and in the shapes, of another layout."""
    renamed = rename(state, backbone_keys(backbone, layout))
    if isinstance(backbone, DiT):
        return join_dit(renamed, backbone) if layout == "dit" else renamed
    return join_qkv(renamed, backbone) if layout == "compvis" else renamed


def read_backbone(state: dict[str, Tensor], backbone: UNet | DiT, layout: Layout) -> dict[str, Tensor]:
    """Weights of another layout under our names; every key must have its place."""
    if isinstance(backbone, DiT):
        state = split_dit(state, backbone) if layout == "dit" else state
    elif layout == "compvis":
        state = split_qkv(state, backbone)
    return rename(state, swap(backbone_keys(backbone, layout)))


def backbone_keys(backbone: UNet | DiT, layout: Layout) -> Pairs:
    """The parameters of a backbone beside their names in another layout."""
    half = isinstance(backbone, UNet) and not len(backbone.decoder)
    kind = "DiT" if isinstance(backbone, DiT) else "noisy classifier" if half else "U-Net"
    legal = {"DiT": ("diffusers", "dit"), "noisy classifier": ("compvis",), "U-Net": ("compvis", "diffusers")}[kind]
    if layout not in legal:
        raise CheckpointError(
            f"no {layout} layout for a {kind}", got=layout, expected=" or ".join(legal), hint=legal[0]
        )
    return dit_keys(backbone, layout) if isinstance(backbone, DiT) else unet_keys(backbone, layout)


def unet_keys(unet: UNet, layout: Layout) -> Pairs:
    """Names in a CompVis file, or of diffusers' UNet2DConditionModel or, for ADM's kind, UNet2DModel."""
    modules = list(UNET_ENDS[layout].items())
    names = {"compvis": compvis_names, "diffusers": diffusers_names}[layout]
    for row, main, attend in names(unet.plan):
        modules += main_modules(unet, row, main, layout)
        modules += attention_modules(unet, row, attend, layout)
    pool = [("out.positions", "out.2.positions")] if isinstance(unet.out, AttentionPool) else []
    return expand(unet, modules + [(f"out.{a}", f"out.2.{b}") for a, b in ATTENTION.items()]) + pool


def dit_keys(dit: DiT, layout: Layout) -> Pairs:
    """The parameters of a class-conditional DiT beside their names elsewhere; diffusers holds an embedder per block."""
    modules = list(DIT_ENDS[layout].items())
    for number in range(len(dit.blocks)):
        ours, theirs = f"blocks.{number}", f"{'transformer_' * (layout == 'diffusers')}blocks.{number}"
        modules += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in DIT_BLOCK[layout].items()]
        modules += [(f"{ours}.attention.{a}", f"{theirs}.{b}") for a, b in DIT_ATTENTION[layout].items()]
        embedder = DIT_EMBEDDER if layout == "diffusers" else {}
        modules += [(a, f"{theirs}.norm1.emb.{b}") for a, b in embedder.items()]
    return expand(dit, modules)


def compvis_names(plan: list[Row]) -> Iterator[tuple[Row, str, str]]:
    """Each row with the CompVis names of its main module and its attention: flat lists of numbered blocks."""
    block, place = -1, 0
    for row in plan:
        part, number = row.name.split(".")
        if part == "encoder":
            yield row, f"input_blocks.{number}.0", f"input_blocks.{number}.1"
        elif part == "middle":
            yield row, f"middle_block.{0 if number == '0' else 2}", "middle_block.1"
        elif row.kind == "res":
            block, place = block + 1, 2 if row.attend else 1
            yield row, f"output_blocks.{block}.0", f"output_blocks.{block}.1"
        else:  # upsampling shares a block with the row before it
            yield row, f"output_blocks.{block}.{place}", ""


def diffusers_names(plan: list[Row]) -> Iterator[tuple[Row, str, str]]:
    """Each row with the diffusers names of its main module and its attention: a block per level, then an index."""
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


def main_modules(unet: UNet, row: Row, theirs: str, layout: Layout) -> Pairs:
    """The modules of a row's convolution, residual block or resampling."""
    if row.kind == "conv":
        return [(f"{row.name}.main", theirs)]
    if row.kind != "res" and unet.resample == "conv":
        return [(f"{row.name}.main.conv", f"{theirs}.{RESAMPLING[layout][row.kind]}")]
    return [(f"{row.name}.main.{a}", f"{theirs}.{b}") for a, b in RESIDUAL_BLOCK[layout].items()]


def attention_modules(unet: UNet, row: Row, theirs: str, layout: Layout) -> Pairs:
    """The modules of the attention after a row: ADM's, or LDM's transformer blocks."""
    if not row.attend:
        return []
    ours = f"{row.name}.attend"
    if unet.context is None:
        pairs = [(f"{ours}.norm", f"{theirs}.{'norm' if layout == 'compvis' else 'group_norm'}")]
        return pairs + [(f"{ours}.attention.{a}", f"{theirs}.{b}") for a, b in ATTENTION.items()]
    pairs = [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in SPATIAL_TRANSFORMER.items()]
    for number in range(row.attend):
        for a, b in TRANSFORMER_BLOCK.items():
            block = (f"{ours}.blocks.{number}.{a}", f"{theirs}.transformer_blocks.{number}.{b}")
            inside = ATTENTION.items() if a.endswith("attention") else ()
            pairs += [(f"{block[0]}.{c}", f"{block[1]}.{d}") for c, d in inside] or [block]
    return pairs


def expand(network: torch.nn.Module, modules: Pairs) -> Pairs:
    """Pairs of parameters from pairs of modules, for those that the network has."""
    parameters = dict(network.named_parameters())
    pairs = [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in modules for leaf in ("weight", "bias")]
    return [(ours, theirs) for ours, theirs in pairs if ours in parameters]


def adm_attentions(unet: UNet) -> Iterator[tuple[str, str, str, int]]:
    """The attentions whose q, k, v ADM keeps in one matrix: the name, those of the joint and last layer, the heads."""
    for row, _, name in compvis_names(unet.plan):
        if row.attend and unet.context is None:
            yield name, "qkv", "proj_out", unet.heads_of(row.out_channels)
    if isinstance(unet.out, AttentionPool):
        yield "out.2", "qkv_proj", "c_proj", 1  # not interleaved: as if it had one head


def split_qkv(state: dict[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """An ADM state with separate q, k, v, which its files interleave head by head in a convolution of width 1."""
    state = dict(state)
    for name, qkv, out, heads in adm_attentions(unet):
        keys = [f"{name}.{layer}.{leaf}" for layer in (qkv, out) for leaf in ("weight", "bias")]
        refuse("tensors are missing", [key for key in keys if key not in state])
        for leaf in ("weight", "bias"):
            joint = state.pop(f"{name}.{qkv}.{leaf}").unflatten(0, (heads, 3, -1))  # (H, 3, D, ...)
            for number, letter in enumerate("qkv"):
                part = joint[:, number].flatten(0, 1)  # (C, C, 1) or (C,)
                state[f"{name}.to_{letter}.{leaf}"] = part.squeeze(-1) if leaf == "weight" else part
        state[f"{name}.to_out.0.weight"] = state.pop(f"{name}.{out}.weight").squeeze(-1)
        state[f"{name}.to_out.0.bias"] = state.pop(f"{name}.{out}.bias")
    if isinstance(unet.out, AttentionPool) and "out.2.positional_embedding" in state:
        state["out.2.positions"] = state.pop("out.2.positional_embedding").T
    return state


def join_qkv(state: dict[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The inverse of `split_qkv`."""
    state = dict(state)
    for name, qkv, out, heads in adm_attentions(unet):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{name}.to_{letter}.{leaf}").unflatten(0, (heads, -1)) for letter in "qkv"]
            joint = torch.stack(parts, 1).flatten(0, 2)  # (3C, C) or (3C,)
            state[f"{name}.{qkv}.{leaf}"] = joint[..., None] if leaf == "weight" else joint
        state[f"{name}.{out}.weight"] = state.pop(f"{name}.to_out.0.weight")[..., None]
        state[f"{name}.{out}.bias"] = state.pop(f"{name}.to_out.0.bias")
    if isinstance(unet.out, AttentionPool):
        state["out.2.positional_embedding"] = state.pop("out.2.positions").T
    return state


def split_dit(state: dict[str, Tensor], dit: DiT) -> dict[str, Tensor]:
    """A DiT state with separate q, k, v, which its files keep in one matrix, one after the other."""
    state = dict(state)
    for name in (f"blocks.{number}.attn" for number in range(len(dit.blocks))):
        for leaf in ("weight", "bias"):
            refuse("tensors are missing", [key for key in [f"{name}.qkv.{leaf}"] if key not in state])
            parts = state.pop(f"{name}.qkv.{leaf}").chunk(3)
            state |= {f"{name}.{letter}.{leaf}": part for letter, part in zip("qkv", parts)}
    return state


def join_dit(state: dict[str, Tensor], dit: DiT) -> dict[str, Tensor]:
    """The inverse of `split_dit`."""
    state = dict(state)
    for name in (f"blocks.{number}.attn" for number in range(len(dit.blocks))):
        for leaf in ("weight", "bias"):
            state[f"{name}.qkv.{leaf}"] = torch.cat([state.pop(f"{name}.{letter}.{leaf}") for letter in "qkv"])
    return state
