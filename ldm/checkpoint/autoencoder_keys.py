"""How diffusers and CompVis name the autoencoder's tensors, derived from its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.checkpoint.rename import rename, swap
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder, Row
from ldm.models.quantize import VectorQuantizer

Layout = Literal["diffusers", "diffusers_old", "compvis"]  # old: before 0.17, as the published SD weights still are

# modules inside a layer; what is not listed has the same name everywhere
_ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.out")
INSIDE: dict[str, dict[str, str]] = {
    "diffusers": {
        **dict(zip(_ATTENTION, ("to_q", "to_k", "to_v", "to_out.0"))),
        "norm": "group_norm",
        "skip": "conv_shortcut",
    },
    "diffusers_old": {
        **dict(zip(_ATTENTION, ("query", "key", "value", "proj_attn"))),
        "norm": "group_norm",
        "skip": "conv_shortcut",
    },
    "compvis": {**dict(zip(_ATTENTION, ("q", "k", "v", "proj_out"))), "skip": "nin_shortcut"},
}
STATISTICS = ("shift", "scale")
DIFFUSERS_LISTS = {"res": "resnets", "attention": "attentions", "down": "downsamplers", "up": "upsamplers"}
COMPVIS_LISTS = {"res": "block", "attention": "attn", "down": "downsample", "up": "upsample"}


def diffusers_layer(row: Row, side: str, levels: int) -> str:
    """A layer's name in diffusers, which counts the decoder's levels from the lowest resolution."""
    if row.level is None:
        stage = "mid_block"
    else:
        stage = f"down_blocks.{row.level}" if side == "encoder" else f"up_blocks.{levels - 1 - row.level}"
    return f"{side}.{stage}.{DIFFUSERS_LISTS[row.kind]}.{row.number}"


def compvis_layer(row: Row, side: str, levels: int) -> str:
    """A layer's name in CompVis, which counts levels from full resolution as we do, and the middle from one."""
    kind = COMPVIS_LISTS[row.kind]
    if row.level is None:
        return f"{side}.mid.{kind}_{row.number + 1}"
    stage = f"{side}.{'down' if side == 'encoder' else 'up'}.{row.level}.{kind}"
    return stage if row.kind in ("down", "up") else f"{stage}.{row.number}"


def autoencoder_keys(autoencoder: Autoencoder, layout: Layout) -> list[tuple[str, str]]:
    """Pairs (ours, theirs), one for each tensor but the latents' shift and scale, which others keep in a config."""
    if autoencoder.stem != 1:
        raise CheckpointError(
            "autoencoder.stem: others have none", layout, str(autoencoder.stem), "1", "our own format"
        )
    layer_name = compvis_layer if layout == "compvis" else diffusers_layer
    norm_out = "norm_out" if layout == "compvis" else "conv_norm_out"
    modules = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
    for side, tower in (("encoder", autoencoder.encoder), ("decoder", autoencoder.decoder)):
        levels = len({row.level for row in tower.plan} - {None})
        modules |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        modules[f"{side}.norm_out"] = f"{side}.{norm_out}"
        for row in tower.plan:
            theirs = layer_name(row, side, levels)
            for name in parametrised(tower.layers[row.name]):
                modules[f"{side}.layers.{row.name}.{name}"] = f"{theirs}.{INSIDE[layout].get(name, name)}"
    pairs = [(f"{ours}.{end}", f"{theirs}.{end}") for ours, theirs in modules.items() for end in ("weight", "bias")]
    if isinstance(autoencoder.bottleneck, VectorQuantizer):
        pairs.append(("bottleneck.codebook", "quantize.embedding.weight"))
    return pairs


def parametrised(layer: nn.Module) -> list[str]:
    """The names of the modules in a layer that have a weight and a bias."""
    return [name.removesuffix(".weight") for name, _ in layer.named_parameters() if name.endswith(".weight")]


def read_autoencoder(state: Mapping[str, Tensor], autoencoder: Autoencoder, layout: Layout) -> dict[str, Tensor]:
    """Our state from theirs, without shift and scale; CompVis's attention is 1x1 convolutions, ours linear."""
    ours = rename(state, swap(autoencoder_keys(autoencoder, layout)))
    return {name: x.flatten(1) if is_linear(name) and x.ndim == 4 else x for name, x in ours.items()}


def write_autoencoder(state: Mapping[str, Tensor], autoencoder: Autoencoder, layout: Layout) -> dict[str, Tensor]:
    """Their state from ours; shift and scale go into their config, or before this through `fold_statistics`."""
    ours = {name: x for name, x in state.items() if name not in STATISTICS}
    if layout == "compvis":
        ours = {name: x[:, :, None, None] if is_linear(name) else x for name, x in ours.items()}
    return rename(ours, autoencoder_keys(autoencoder, layout))


def is_linear(name: str) -> bool:
    """Whether a tensor of ours is the weight of a linear layer: attention's only."""
    return ".attention." in name and name.endswith(".weight")


@torch.no_grad()
def fold_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state with shift and scale inside the convolutions around a KL bottleneck, for readers that know one scalar.

    With s = scale: mean' = (mean - shift) s, logvar' = logvar + 2 log s; what decodes undoes the same.
    """
    state = dict(state)
    shift, scale = (state[name].expand(state["post_quant.weight"].shape[1], 1, 1).flatten() for name in STATISTICS)
    channels = len(scale)
    weight, bias = state["quant.weight"].clone(), state["quant.bias"].clone()
    weight[:channels] *= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) * scale
    bias[channels:] += 2 * scale.log()
    state |= {"quant.weight": weight, "quant.bias": bias}
    weight = state["post_quant.weight"]
    state["post_quant.bias"] = state["post_quant.bias"] + (weight * shift[:, None, None]).sum(dim=(1, 2, 3))
    state["post_quant.weight"] = weight / scale[:, None, None]
    state |= {"shift": torch.zeros_like(state["shift"]), "scale": torch.ones_like(state["scale"])}
    return state
