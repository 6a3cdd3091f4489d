"""From the weights of one part in somebody's names to its configuration and its weights in ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoint.autoencoder_keys import STATISTICS, read_autoencoder
from ldm.checkpoint.backbone_keys import read_backbone
from ldm.checkpoint.hyperparameters import DITS, autoencoder_numbers, dit_numbers, text_numbers, unet_numbers
from ldm.checkpoint.networks import build_autoencoder, build_backbone, build_text, fit
from ldm.checkpoint.text_keys import read_text
from ldm.errors import CheckpointError

State = dict[str, Tensor]
Node = dict[str, Any]
OLD_ATTENTION = ".query.weight"  # diffusers before 0.17


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def above(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors with a beginning added to their names."""
    return {f"{prefix}{name}": x for name, x in state.items()}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(x.shape) for name, x in state.items()}


def numbers_of(function: Any, state: Mapping[str, Tensor], layout: str, what: str) -> dict[str, Any]:
    """A part's numbers, or an error for people if names are missing that tell them."""
    try:
        return function(shapes_of(state), layout)
    except (KeyError, ValueError, ZeroDivisionError, IndexError) as error:
        got, hint = f"no {error} to tell its shape", "a file of one of the families in the docs"
        raise CheckpointError(f"not a {what} that is known here", layout, got, hint=hint) from error


def open_backbone(
    state: Mapping[str, Tensor], layout: str, heads: Mapping[str, int], stored: Node | None = None
) -> tuple[Node, Node, State]:
    """A backbone's configuration, what the assembly gives it, and its weights in our names."""
    dit = layout == "dit" or DITS["diffusers"]["first"] in state
    numbers = numbers_of(dit_numbers if dit else unet_numbers, state, layout, "DiT" if dit else "U-Net")
    given = numbers.pop("given")
    node = stored or {"type": "dit" if dit else "unet", **numbers, **heads}
    network = build_backbone(node, given)
    try:
        ours = read_backbone(dict(state), network, layout)  # type: ignore[arg-type]
    except RuntimeError as error:  # a joint matrix of q, k, v that does not divide
        raise CheckpointError("tensors of another shape in the backbone", layout, str(error)) from error
    fit(ours, network, "backbone")
    return node, given, above(ours, "backbone.")


def open_autoencoder(
    state: Mapping[str, Tensor], scale: Tensor, shift: Tensor, stored: Node | None = None
) -> tuple[Node, State]:
    """A first stage's configuration and its weights in our names, whichever of three layouts it came in."""
    layout = "compvis" if any(name.startswith("encoder.down.") for name in state) else "diffusers"
    node = stored or numbers_of(autoencoder_numbers, state, layout, "first stage")
    network = build_autoencoder(node)
    old = layout == "diffusers" and any(name.endswith(OLD_ATTENTION) for name in state)
    ours = read_autoencoder(state, network, "diffusers_old" if old else layout)  # type: ignore[arg-type]
    ours |= dict(zip(STATISTICS, (shift, scale)))
    fit(ours, network, "first stage")
    return node, above(ours, "autoencoder.")


def open_text(
    state: Mapping[str, Tensor], layout: str, kind: str, stored: Node | None = None, **others: Any
) -> tuple[Node, State]:
    """A text conditioner's configuration and its weights in our names; `others` is what no shape tells."""
    node = stored or {"type": kind, **numbers_of(text_numbers, state, layout, "text encoder"), **others}
    network = build_text(node)
    ours = read_text(state, network, layout)  # type: ignore[arg-type]
    fit(ours, network, "text encoder")
    return node, above(ours, "transformer.")
