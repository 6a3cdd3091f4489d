"""Convert a checkpoint between formats and types: ours, CompVis single files, diffusers folders; .ckpt and .pt in."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import own_parts, plugin_option
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint

FORMATS = ("ldm", "compvis", "diffusers")
DTYPES = ("float32", "float16", "bfloat16")
SAMPLED = ("guidance", "spacing", "solver")  # how a file says that it is sampled


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", metavar="SRC", help="any checkpoint: a file, or a folder of diffusers")
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a new folder for diffusers")
    parser.add_argument("--to", choices=FORMATS, help="the format; without it, ours for a file, diffusers for a folder")
    parser.add_argument("--dtype", choices=DTYPES, help="the weights' type; as they are without it")
    parser.add_argument("--vae", metavar="PATH", help="another checkpoint, whose first stage is taken")
    plugin_option(parser)
    parser.add_argument("--prediction", choices=("eps", "v"), help="overrules what was recognised")
    what = "how DST is sampled, such as guidance.cfg=3; or where an encoder is that SRC leaves out"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"{what}: conditioner.weights=FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Open, say what it is, write."""
    own_parts(arguments)
    target = Path(arguments.target)
    layout = check(target, arguments.to)
    import torch

    from ldm import assemble, checkpoint

    loaded = checkpoint.open(arguments.source, vae=arguments.vae, pickles=True)
    sampled = [words for words in arguments.overrides if words.startswith(SAMPLED)]
    elsewhere = [words for words in arguments.overrides if words not in sampled]
    if elsewhere and not loaded.config.get("left_out"):
        raise InputError("SRC leaves no encoder out", arguments.source, elsewhere[0])
    if sampled:
        loaded = settled(loaded, sampled)
    if layout != "ldm" or elsewhere:
        loaded = assemble.whole(loaded, elsewhere)
    if arguments.prediction:
        loaded.config["prediction"] = {"type": arguments.prediction}
    count = sum(x.numel() for x in loaded.state.values())
    print(f"{arguments.source}: {loaded.family}, {len(loaded.state)} tensors, {count / 1e6:.1f} M numbers")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    for note in loaded.notes + write(loaded, target, layout, dtype):
        print(f"note: {note}")
    print(f"wrote {target} ({layout}{', ' + arguments.dtype if arguments.dtype else ''})")
    return 0


def settled(loaded: Checkpoint, overrides: list[str]) -> Checkpoint:
    """With other settings of the sampler."""
    from ldm import assemble

    source = str(loaded.files[0])
    if not loaded.config.get("backbone"):
        raise InputError("a first stage alone is not sampled", source, overrides[0])
    config = assemble.configure(loaded.config, source, overrides)
    config.build("guidance"), assemble.solver(config), assemble.grid(config, config.build("path"))  # they can be built
    return replace(loaded, config={**loaded.config, **{name: config[name] for name in SAMPLED}})


def check(target: Path, layout: str | None) -> str:
    """The format to write, once it is clear that it can be written there."""
    layout = layout or ("ldm" if target.suffix else "diffusers")
    if layout != "diffusers" and target.suffix != ".safetensors":
        raise InputError("not a name for a file of weights", "DST", str(target), "NAME.safetensors")
    if not target.absolute().parent.is_dir():
        raise InputError("no such folder", "DST", str(target.parent), "a folder that exists")
    if layout == "diffusers" and target.exists():
        raise InputError("exists already", "DST", str(target), "a new folder")
    return layout


def write(loaded: Checkpoint, target: Path, layout: str, dtype: Any) -> list[str]:
    """Write in a format; returns what its user should know."""
    from ldm import checkpoint

    if layout == "compvis":
        return checkpoint.write_compvis(target, loaded.config, loaded.state, dtype)
    tokenizer = tokenizer_of(loaded)
    if layout == "diffusers":
        return checkpoint.write_diffusers(target, loaded.config, loaded.state, tokenizer, dtype)
    carried = tokenizer.to_json() if tokenizer is not None else None
    checkpoint.save(target, loaded.config, loaded.state, carried, dtype)
    return []


def tokenizer_of(loaded: Checkpoint) -> Any:
    """The tokenizer that came along, or CLIP's, where the model's vocabulary is that; None where there is none."""
    from ldm.conditioning.tokenizer import clip_tokenizer, from_checkpoint

    if loaded.tokenizer is not None:
        return from_checkpoint(loaded.tokenizer)
    conditioner = loaded.config.get("conditioner") or {}
    node = conditioner.get("parts", [conditioner])[0]
    if node.get("type") in ("clip", "open_clip") and node["vocabulary"] == 49408:
        return clip_tokenizer(0 if node["type"] == "open_clip" else 49407)
    return None
