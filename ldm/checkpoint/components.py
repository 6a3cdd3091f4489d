"""From one part's weights in another program's names to its configuration and its weights in ours, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.autoencoder_keys import STATISTICS, fold_statistics, read_autoencoder
from ldm.checkpoint.family import Backbone
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.compvis import IGNORED, SCALE
from ldm.checkpoint.formats.diffusers import Folder
from ldm.checkpoint.hyperparameters import Node, autoencoder_numbers, text_numbers
from ldm.checkpoint.networks import build_autoencoder, build_backbone, build_text, fit
from ldm.checkpoint.rename import State, above, under
from ldm.checkpoint.text_keys import read_text, write_text
from ldm.errors import CheckpointError

SD_SCALE = 0.18215
NO_STAGE = "no first stage inside: give one with --vae"
OLD_ATTENTION = ".query.weight"  # diffusers before 0.17


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(x.shape) for name, x in state.items()}


def infer(function: Callable[..., Node], state: Mapping[str, Tensor], layout: str, what: str) -> Node:
    """A part's numbers from its shapes, or a readable error if a name that determines them is missing."""
    try:
        return function(shapes_of(state), layout)
    except (KeyError, ValueError, ZeroDivisionError, IndexError) as error:
        got, hint = f"no {error} to infer its shape from", "a file of one of the families in the docs"
        raise CheckpointError(f"not a supported {what}", layout, got, hint=hint) from error


def open_backbone(
    kind: Backbone, state: Mapping[str, Tensor], layout: str, heads: Mapping[str, int], stored: Node | None = None
) -> tuple[Node, Node, State]:
    """A backbone's node, what the assembly gives it, and its weights in our names."""
    state = {name: x for name, x in state.items() if name not in kind.computed}
    numbers = infer(kind.numbers, state, layout, kind.title)
    given = infer(kind.given, state, layout, kind.title)
    node = stored or {"type": kind.type, **numbers, **heads}
    network = build_backbone(node, given, kind.title)
    ours = kind.keys(network, layout).read(state, network)
    fit(ours, network, "backbone")
    return node, given, above(ours, "backbone.")


def stored_backbone(kind: Backbone, node: Node, state: Mapping[str, Tensor]) -> tuple[Any, State]:
    """A backbone of ours without memory, and its weights, which must be exactly its own."""
    weights = under(state, "backbone.")
    given = infer(kind.given, weights, "ours", kind.title)
    network = build_backbone(node, given, kind.title)
    fit(weights, network, "backbone")
    return network, weights


def open_text(
    state: Mapping[str, Tensor], layout: str, kind: str, stored: Node | None = None, **others: Any
) -> tuple[Node, State]:
    """A text encoder's node and its weights in our names; `others` replaces what shapes say."""
    node = stored or {"type": kind, **infer(text_numbers, state, layout, "text encoder"), **others}
    network = build_text(node)
    ours = read_text(state, network, layout)
    fit(ours, network, "text encoder")
    return node, above(ours, "transformer.")


def write_encoder(node: Node, state: Mapping[str, Tensor], layout: str) -> State:
    """A text encoder's weights in the names of a layout."""
    weights, network = under(state, "transformer."), build_text(node)
    fit(weights, network, "text encoder")
    return write_text(weights, network, layout)


def open_autoencoder(
    state: Mapping[str, Tensor], scale: Tensor, shift: Tensor, stored: Node | None = None
) -> tuple[Node, State]:
    """A first stage's node and its weights in our names, whichever of three layouts it came in."""
    layout = "compvis" if any(name.startswith("encoder.down.") for name in state) else "diffusers"
    node = stored or infer(autoencoder_numbers, state, layout, "first stage")
    network = build_autoencoder(node)
    old = layout == "diffusers" and any(name.endswith(OLD_ATTENTION) for name in state)
    ours = read_autoencoder(state, network, "diffusers_old" if old else layout)
    ours |= dict(zip(STATISTICS, (shift, scale)))
    fit(ours, network, "first stage")
    return node, above(ours, "autoencoder.")


def stage_in_file(tensors: Tensors, prefix: str, stored: Node | None, notes: list[str]) -> tuple[Node | None, State]:
    """The first stage under a prefix, if there is one, with the latents' scale that the file or its kind has."""
    state = {name: x for name, x in under(tensors, prefix).items() if not name.startswith(tuple(IGNORED))}
    state.pop(SCALE, None)
    if not state:
        notes.append(NO_STAGE)
        return None, {}
    if SCALE in tensors:
        scale = tensors[SCALE].squeeze()
    elif any(name.startswith("quantize.") for name in state):
        scale = torch.ones(())
    else:
        scale = torch.tensor(SD_SCALE)
        notes.append(f"the file has no latent scale: Stable Diffusion's {SD_SCALE} is used")
    return open_autoencoder(state, scale, torch.zeros_like(scale), stored)


def stage_in_folder(folder: Folder, part: str) -> tuple[Node, State]:
    """A first stage from its own folder; like diffusers' pipelines of these families, it has no shift."""
    settings, weights = folder.open(part)
    default = 1.0 if settings.get("_class_name") == "VQModel" else SD_SCALE
    scale = torch.tensor(settings.get("scaling_factor") or default)
    return open_autoencoder(weights, scale, torch.zeros(()))


def stage_to_write(
    node: Node, state: Mapping[str, Tensor], notes: list[str], keep_latents: bool = False
) -> tuple[Node, State, Tensor]:
    """A first stage as others can express it: its node, its weights, and the one number that scales latents.

    `keep_latents`: a condition reads latents before shift and scale, so that they cannot move into the weights.
    """
    if node["type"] not in ("kl", "vq"):
        raise CheckpointError("other programs have no such first stage", got=node["type"], expected="kl or vq")
    weights = under(state, "autoencoder.")
    fit(weights, build_autoencoder(node), "first stage")
    if weights["scale"].ndim or weights["shift"].count_nonzero():
        if node["type"] != "kl" or keep_latents:
            which = "latents" if node["type"] == "kl" else "codes"
            what = f"other programs cannot store a shift of the {which}"
            raise CheckpointError(what, "autoencoder.shift", hint="ldm's own format")
        weights = fold_statistics(weights) | {"shift": torch.zeros(()), "scale": torch.ones(())}
        notes.append("the latents' shift and scale are now inside the first stage's convolutions")
        node = {name: value for name, value in node.items() if name != "per_channel"}
    return node, weights, weights["scale"]
