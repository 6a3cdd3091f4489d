"""The networks that a stored configuration describes, without memory for their weights, and strict loading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ldm.config import parts
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.empty import empty
from ldm.models.transformer import TextTransformer

Node = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

ROWS = 12  # of a table of differences
TEXTS: dict[str, Node] = {  # what each text conditioner gives its TextTransformer beside its own arguments
    "clip": {"activation": "quick_gelu"},
    "open_clip": {"activation": "gelu"},
    "joint_text": {"causal": False, "bias": False},
}
TEXT_ARGUMENTS = ("width", "layers", "heads", "head_width", "length", "vocabulary", "projection")
COUNTS = ("layers", "depth", "blocks")  # arguments that count modules
SIZES = (
    *("width", "hidden", "head_width", "heads", "length", "vocabulary", "projection", "classes", "chunks"),
    *("channels", "multipliers", "latent", "codes", "patch"),
)
ALWAYS = 1024  # a size that needs no tensor to confirm it
LARGEST = 2**16  # of numbers that no tensor can confirm: steps of a schedule, sides of a picture


def check_sizes(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Refuse sizes in a configuration that the tensors beside it do not confirm, before anything is built from them.

    A network has at least one tensor for each of its layers, and its widths are sides of its tensors.
    """
    widest = max((side for shape in shapes.values() for side in shape), default=0)
    external = config.get("left_out") or {}  # encoders that are stored elsewhere
    for key, node in nodes(config):
        layers = math.prod(max(integers(node.get(name)), default=1) for name in COUNTS)
        layers *= len(integers(node.get("multipliers"))) or 1
        check_size(f"{key}: more layers than tensors", layers, max(len(shapes), ALWAYS), where)
        for name in SIZES if f"{key}.weights" not in external else ():
            size = max(integers(node.get(name)), default=0)
            check_size(f"{key}.{name}: no tensor is so large", size, max(widest, ALWAYS), where)
    settings = {axis: config.get(axis) for axis in ("path", "spacing")}
    others = {f"{axis}.steps": node.get("steps") for axis, node in settings.items() if isinstance(node, dict)}
    for key, value in (others | {"size": config.get("size")}).items():
        check_size(f"{key}: too large", max(integers(value), default=0), LARGEST, where)


def check_size(what: str, size: int, limit: int, where: str) -> None:
    """Refuse a size above its limit."""
    if size > limit:
        raise CheckpointError(what, where, f"{size:.3g}" if size > 10**9 else str(size), f"at most {limit}")


def nodes(config: Mapping[str, Any]) -> Iterator[tuple[str, Node]]:
    """The nodes of a configuration that describe networks, with their keys."""
    found = [(axis, config.get(axis)) for axis in ("backbone", "conditioner", "autoencoder")]
    for key, node in found:
        if isinstance(node, dict):
            yield key, node
            found += [(f"{key}.parts.{number}", part) for number, part in enumerate(node.get("parts") or ())]


def integers(value: Any) -> list[int]:
    """The integers in a value: itself, or those of a list."""
    return [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]


def build(function: Any, arguments: Mapping[str, Any], what: str) -> Any:
    """A network on the meta device, or a readable error if its numbers describe none."""
    try:
        with empty():
            return function(**arguments)
    except (ValueError, TypeError, ZeroDivisionError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"not a valid {what}", got=str(error)) from error


def build_backbone(node: Mapping[str, Any], given: Mapping[str, Any], what: str = "U-Net") -> Any:
    """The backbone of a configuration and of what the assembly gives it."""
    arguments = {name: value for name, value in node.items() if name != "type"}
    return build(parts.find("backbone", node["type"]), {**arguments, **given}, what)


def build_autoencoder(node: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder of a configuration, which may be a plugin's."""
    arguments = {name: value for name, value in node.items() if name != "type"}
    if node["type"] not in (known := parts.TABLES["autoencoder"]):
        expected = f"one of {', '.join(known)}"
        raise CheckpointError("autoencoder.type: unknown name", got=node["type"], expected=expected, hint="--plugin")
    autoencoder: Autoencoder = build(parts.find("autoencoder", node["type"]), arguments, "autoencoder")
    return autoencoder


def build_text(node: Mapping[str, Any]) -> TextTransformer:
    """The transformer inside a text conditioner."""
    arguments = {name: node[name] for name in TEXT_ARGUMENTS if node.get(name) is not None}
    if node["type"] == "open_clip":
        arguments["layers"] -= 1  # the last one is not read
    text: TextTransformer = build(TextTransformer, {**arguments, **TEXTS[node["type"]]}, "text encoder")
    return text


def autoencoder_of(node: Mapping[str, Any], state: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder in a checkpoint, with its weights, frozen."""
    autoencoder = build_autoencoder(node)
    load_weights(autoencoder, state, "autoencoder")
    return autoencoder.eval().requires_grad_(False)


def fingerprint(node: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """The fingerprint of the autoencoder in a checkpoint."""
    return autoencoder_of(node, state).fingerprint()


def load_weights(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Load the tensors under a prefix strictly; a module on the meta device takes them over without a copy."""
    dotted = f"{prefix.rstrip('.')}." if prefix else ""
    own = {name.removeprefix(dotted): state[name] for name in state if name.startswith(dotted)}
    fit(own, module, prefix.rstrip(".") or type(module).__name__)
    empty = any(x.is_meta for x in module.state_dict().values())
    module.load_state_dict(own, assign=empty)


def fit(state: Mapping[str, Tensor], network: nn.Module, what: str) -> None:
    """Refuse tensors that are not exactly a network's: missing, left over, or of another shape."""
    own = network.state_dict()
    problems = ("missing tensors in the ", "unexpected tensors in the ", "tensors of another shape in the ")
    for problem, names in zip(problems, misfits(own, state).values()):
        if names:
            shaped = problem == problems[-1]
            found = [f"{x} {shape(state, x)} for {shape(own, x)}" if shaped else x for x in names[:5]]
            got = f"{len(names)}: {', '.join(found)}{', ...' * (len(names) > 5)}"
            error = CheckpointError(f"{problem}{what}", got=got, expected="none")
            error.table = differences(own, state)
            raise error


def misfits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names about which a network and a checkpoint disagree, by kind."""
    return {
        "missing": [name for name in ours if name not in theirs],
        "extra": [name for name in theirs if name not in ours],
        "other shape": [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape],
    }


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """A table of what a network and a checkpoint disagree about: a few rows of each kind, and how many more."""
    kinds = misfits(ours, theirs)
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
