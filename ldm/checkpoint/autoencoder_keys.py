"""How diffusers and CompVis name an autoencoder's tensors, made from its plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoint.rename import KeyMap, State, expand
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder, Row
from ldm.models.quantize import VectorQuantizer

ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.out")
INSIDE: dict[str, dict[str, str]] = {  # modules inside a layer; others have the same name everywhere
    layout: {**dict(zip(ATTENTION, attention)), **others}
    for layout, attention, others in (
        ("diffusers", ("to_q", "to_k", "to_v", "to_out.0"), {"norm": "group_norm", "skip": "conv_shortcut"}),
        ("diffusers_old", ("query", "key", "value", "proj_attn"), {"norm": "group_norm", "skip": "conv_shortcut"}),
        ("compvis", ("q", "k", "v", "proj_out"), {"skip": "nin_shortcut"}),
    )
}  # old: before 0.17, as the published Stable Diffusion weights still are
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


def autoencoder_keys(autoencoder: Autoencoder, layout: str) -> KeyMap:
    """All tensors but the latents' shift and scale, which others keep in a config."""
    if autoencoder.stem != 1:
        what, got = "autoencoder.stem: other programs do not support it", str(autoencoder.stem)
        raise CheckpointError(what, layout, got, "1", "our own format")
    compvis = layout == "compvis"
    layer_name, norm_out = (compvis_layer, "norm_out") if compvis else (diffusers_layer, "conv_norm_out")
    modules = [("quant", "quant_conv"), ("post_quant", "post_quant_conv")]
    for side, tower in (("encoder", autoencoder.encoder), ("decoder", autoencoder.decoder)):
        levels = len({row.level for row in tower.plan} - {None})
        modules += [(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out")]
        modules.append((f"{side}.norm_out", f"{side}.{norm_out}"))
        for row in tower.plan:
            theirs = layer_name(row, side, levels)
            for name, _ in tower.layers[row.name].named_modules():
                modules.append((f"{side}.layers.{row.name}.{name}", f"{theirs}.{INSIDE[layout].get(name, name)}"))
    pairs = expand(autoencoder, modules)
    linear = [theirs for ours, theirs in pairs if ".attention." in ours and ours.endswith(".weight")]
    if isinstance(autoencoder.bottleneck, VectorQuantizer):
        pairs.append(("bottleneck.codebook", "quantize.embedding.weight"))
    return KeyMap(pairs, convolutions=dict.fromkeys(linear, 4) if compvis else {})


def read_autoencoder(state: Mapping[str, Tensor], autoencoder: Autoencoder, layout: str) -> State:
    """Our tensors from theirs, without shift and scale."""
    return autoencoder_keys(autoencoder, layout).read(state, autoencoder)


def write_autoencoder(state: Mapping[str, Tensor], autoencoder: Autoencoder, layout: str) -> State:
    """Their tensors from ours; shift and scale go into their config, or before this through `fold_statistics`."""
    ours = {name: x for name, x in state.items() if name not in STATISTICS}
    return autoencoder_keys(autoencoder, layout).write(ours)


@torch.no_grad()
def fold_statistics(state: Mapping[str, Tensor]) -> State:
    """Our tensors with shift and scale folded into the convolutions around a KL bottleneck, for readers of one scalar.

    With s = scale: mean' = (mean - shift) s, logvar' = logvar + 2 log s; the decoder undoes the same.
    """
    shift, scale = (state[name].expand(state["post_quant.weight"].shape[1], 1, 1).flatten() for name in STATISTICS)
    channels, decode = len(scale), state["post_quant.weight"]
    weight, bias = state["quant.weight"].clone(), state["quant.bias"].clone()
    weight[:channels] *= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) * scale
    bias[channels:] += 2 * scale.log()
    return dict(state) | {
        "quant.weight": weight,
        "quant.bias": bias,
        "post_quant.weight": decode / scale[:, None, None],
        "post_quant.bias": state["post_quant.bias"] + (decode * shift[:, None, None]).sum(dim=(1, 2, 3)),
        "shift": torch.zeros_like(state["shift"]),
        "scale": torch.ones_like(state["scale"]),
    }
