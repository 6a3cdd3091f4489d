"""The conditioner of a published model: its text encoder or label table, and the images that extra channels carry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoint.components import Node, State, above, open_text, under
from ldm.checkpoint.families import Family
from ldm.errors import CheckpointError

EXTRAS = {"inpainting": "masked_image", "edit": "edit"}  # what the extra channels are, and our conditioner for them


def extra_kind(given: Node, where: str) -> str:
    """What a backbone's extra channels are for: a mask beside an image's latents, an image's latents, or nothing."""
    latent, extra = given["in_channels"], given["extra_channels"]
    kinds = {0: "", latent: "edit", latent + 1: "inpainting"}
    if extra not in kinds:
        expected = f"{latent}, {2 * latent} (edit) or {2 * latent + 1} (inpainting)"
        raise CheckpointError("nobody says what its input channels are", where, str(latent + extra), expected)
    return kinds[extra]


def open_conditioner(family: Family, state: State, kind: str, stored: Node | None) -> tuple[Node | None, State]:
    """The configuration of a family's conditioner, and its weights in our names."""
    found = text_node(stored)[0] if stored else None
    node: Node | None
    if family.layout and family.conditioner:
        node, ours = open_text(state, family.layout, family.conditioner, found)
    elif family.conditioner:
        node, ours = open_label(state)
    else:
        return None, {}
    node, ours = compose(node, above(ours, "conditioner."), kind)
    return stored or node, ours


def compose(node: Node | None, state: State, kind: str) -> tuple[Node | None, State]:
    """A conditioner together with the images that extra channels carry."""
    if not kind or node is None:
        return node, state
    state = above(under(state, "conditioner."), "conditioner.members.0.")
    return {"type": "compose", "parts": [node, {"type": EXTRAS[kind]}]}, state


def open_label(state: State) -> tuple[Node, State]:
    """LDM's class-conditional models: a table of labels, the last of which means nothing, read as tokens."""
    rows, width = state["embedding.weight"].shape
    return {"type": "label", "classes": rows, "null": rows - 1, "width": width}, {
        "table.weight": state["embedding.weight"]
    }


def text_node(conditioner: Node) -> tuple[Node, str]:
    """The first part of a conditioner, which has the text or the label, and where its weights are."""
    return (conditioner["parts"][0], "members.0.") if conditioner["type"] == "compose" else (conditioner, "")


def weights_of(conditioner: Node, state: Mapping[str, Tensor]) -> State:
    """The weights of that part, from a whole state."""
    return under(state, f"conditioner.{text_node(conditioner)[1]}")


def kind_of(conditioner: Node | None) -> str:
    """What the other parts are for: one of EXTRAS, or nothing."""
    if conditioner is None or conditioner["type"] != "compose":
        return ""
    types = [part["type"] for part in conditioner["parts"]]
    for kind, extra in EXTRAS.items():
        if types[1:] == [extra]:
            return kind
    raise CheckpointError("others have no such conditioner", got=", ".join(types), hint="our own format")
