"""The networks that a stored configuration describes, without memory: what key maps are derived from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint.hyperparameters import given
from ldm.config import parts
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.dit import DiT
from ldm.models.empty import empty
from ldm.models.transformer import TextTransformer
from ldm.models.unet import UNet

Node = Mapping[str, Any]
ROWS = 12  # of a table of differences

BACKBONES: dict[str, Any] = {"unet": UNet, "dit": DiT}
TEXTS: dict[str, dict[str, Any]] = {  # what each text conditioner gives its TextTransformer beside its own arguments
    "clip": {"activation": "quick_gelu"},
    "open_clip": {"activation": "gelu"},
    "joint_text": {"causal": False, "bias": False},
}
TEXT_ARGUMENTS = ("width", "layers", "heads", "head_width", "length", "vocabulary", "projection")


def build(function: Any, arguments: Mapping[str, Any], what: str) -> Any:
    """A network on the meta device, or an error for people if its numbers describe none."""
    try:
        with empty():
            return function(**arguments)
    except (ValueError, TypeError, ZeroDivisionError, NotImplementedError) as error:
        raise CheckpointError(f"no {what} has such numbers", got=str(error)) from error


def build_backbone(node: Node, supplied: Mapping[str, Any]) -> UNet | DiT:
    """The backbone of a configuration and of what the assembly gives it."""
    arguments = {name: value for name, value in node.items() if name != "type"}
    dit = node["type"] == "dit"
    return build(BACKBONES[node["type"]], {**arguments, **supplied}, "DiT" if dit else "U-Net")


def build_autoencoder(node: Node) -> Autoencoder:
    """The autoencoder of a configuration, which may be one of a user's own."""
    arguments = {name: value for name, value in node.items() if name != "type"}
    if node["type"] not in (known := parts.TABLES["autoencoder"]):
        expected = f"one of {', '.join(known)}"
        raise CheckpointError("autoencoder.type: unknown name", got=node["type"], expected=expected, hint="--plugin")
    return build(parts.find("autoencoder", node["type"]), arguments, "autoencoder")


def autoencoder_of(node: Node, state: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder in a checkpoint, with its weights, frozen."""
    autoencoder = build_autoencoder(node)
    load_weights(autoencoder, state, "autoencoder")
    return autoencoder.eval().requires_grad_(False)


def fingerprint(node: Node, state: Mapping[str, Tensor]) -> str:
    """That of the autoencoder in a checkpoint."""
    return autoencoder_of(node, state).fingerprint()


def build_text(node: Node) -> TextTransformer:
    """The transformer inside a text conditioner."""
    arguments = {name: node[name] for name in TEXT_ARGUMENTS if node.get(name) is not None}
    if node["type"] == "open_clip":
        arguments["layers"] -= 1  # the last one is not read
    return build(TextTransformer, {**arguments, **TEXTS[node["type"]]}, "text encoder")


def supplied(node: Node, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the assembly gave a backbone, read off its own tensors."""
    shapes = {name: tuple(state[name].shape) for name in state}
    label = shapes.get("time.label.weight", (None,))[0]
    pooled = shapes.get("time.pooled.0.weight", (0, None))[1]
    keys = [name for name in shapes if name.endswith("cross_attention.k.weight")]
    context = shapes[keys[0]][1] if keys else None
    if node["type"] == "dit":
        first, out = shapes["embed.weight"], shapes["out.weight"][0] // shapes["embed.weight"][2] ** 2
    else:
        first, out = shapes["encoder.0.main.weight"], shapes["out.weight"][0]
    return given(first[1], out, context=context, classes=label, pooled=pooled)


def fit(state: Mapping[str, Tensor], network: nn.Module, what: str) -> None:
    """Refuse tensors that are not exactly a network's: missing, extra, or of another shape."""
    own = network.state_dict()
    wrong = {
        "tensors are missing": [name for name in own if name not in state],
        "tensors without a place": [name for name in state if name not in own],
        "tensors of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    for problem, names in wrong.items():
        if names:
            shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
            error = CheckpointError(f"{problem} in the {what}", got=f"{len(names)}: {shown}", expected="none")
            error.table = differences(own, state)
            raise error


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """A table of what a network and a checkpoint disagree about, of each kind about as many rows, and how many more."""
    kinds = {
        "missing": [name for name in ours if name not in theirs],
        "extra": [name for name in theirs if name not in ours],
        "other shape": [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape],
    }
    shown = ROWS // max(1, sum(bool(names) for names in kinds.values()))
    rows = [("", "tensor", "the network's", "the checkpoint's")]
    for kind, names in kinds.items():
        rows += [(kind, name, shape(ours, name), shape(theirs, name)) for name in names[:shown]]
        rows += [(kind, f"and {len(names) - shown} more", "", "")] * (len(names) > shown)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def shape(state: Mapping[str, Tensor], name: str) -> str:
    """A tensor's shape as a table shows it."""
    return str(tuple(state[name].shape)) if name in state else "-"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give a module the tensors under a prefix, exactly; on the meta device they become its own, without a copy."""
    dotted = f"{prefix.rstrip('.')}." if prefix else ""
    own = {name.removeprefix(dotted): state[name] for name in state if name.startswith(dotted)}
    fit(own, module, prefix.rstrip(".") or type(module).__name__)
    empty = any(x.is_meta for x in module.state_dict().values())
    module.load_state_dict(own, assign=empty)
